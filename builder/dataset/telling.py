"""Some rows → one telling position of them: what the teacher expected there and what followed, and the line of text around it.

The position is the one whose entropy is nearest to MIDDLING among those where the token that follows is in the list: neither certain nor
anything at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.corpus.sequences import NO_TOKEN
from builder.dataset.info import alternatives_of
from builder.dataset.spelling import columns, pieces

MIDDLING = 1.5
"""Nats."""
LEAST_CONTEXT = 5
"""Tokens, if there are so many."""
SHOWN = 5
MAX_CONTEXT_CHARACTERS = 100
BEFORE, BEHIND = 120, 90
"""Columns of text around the token that followed."""
MAX_TOKENS = BEFORE + BEHIND + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is needed of a row."""

    values: dict[str, Any]
    """`input_ids` as a list, and every other column as an array."""
    targets: list[int]
    """The token that follows each position."""
    kept_T: npt.NDArray[np.bool_]
    """Positions that columns of several values have."""


def telling_position(rows: Sequence[Row], tokenizer: Any) -> dict[str, Any] | None:
    """Plain JSON values; None where no position will do.

    Args:
        rows: to choose from.
        tokenizer: the teacher's.
    """
    found: list[tuple[bool, bool, float, int, int]] = []
    for number, row in enumerate(rows):
        entropy = row.values["entropy"].astype(np.float64)
        is_known = np.array(row.targets) != NO_TOKEN
        for position in np.flatnonzero(row.kept_T & is_known).tolist():
            has_context = position + 1 >= LEAST_CONTEXT
            distance = abs(float(entropy[position]) - MIDDLING)
            found.append(
                (not _is_listed(row, position), not has_context, distance, number, position)
            )
    if not found:
        return None
    number, position = min(found)[-2:]
    row = rows[number]
    index = int(row.kept_T[:position].sum())
    there = alternatives_of(row.values, row.targets, position, index, tokenizer)
    probability = there.following_probability
    return {
        "context": there.context[-MAX_CONTEXT_CHARACTERS:],
        "is_cut": len(there.context) > MAX_CONTEXT_CHARACTERS,
        "tokens": there.tokens[:SHOWN],
        "probabilities": [round(float(p), 4) for p in there.probabilities[:SHOWN]],
        "listed": len(there.tokens),
        "rest": round(float(there.probabilities[SHOWN:].sum()), 4),
        "tail": round(there.tail, 4),
        "draws": there.drawn[:SHOWN],
        "following": there.following or "",
        "rank": there.rank,
        "following_probability": None if math.isnan(probability) else round(probability, 4),
        "entropy": round(there.entropy, 3),
        "line": _line(row, position, tokenizer),
    }


def _line(row: Row, position: int, tokenizer: Any) -> dict[str, Any]:
    """The text around the token that followed a position, token by token, each with its surprise: −log p, given the text before it."""
    followed = position + 1
    ids = [*row.values["input_ids"], row.targets[-1]]
    first = max(0, followed - BEFORE)
    texts = pieces(tokenizer, [i for i in ids[first : followed + BEHIND] if i != NO_TOKEN])
    widths = [max(1, columns(text)) for text in texts]
    start = stop = followed - first
    while start > 0 and sum(widths[start - 1 : followed - first]) <= BEFORE:
        start -= 1
    while stop < len(texts) and sum(widths[followed - first : stop + 1]) <= BEHIND:
        stop += 1
    stop = max(stop, followed - first + 1)
    return {
        "tokens": texts[start:stop],
        "surprises": [_surprise(row, first + i) for i in range(start, stop)],
        "followed": followed - first - start,
        "is_cut": first + start > 0,
    }


def _surprise(row: Row, index: int) -> float | None:
    """Of a token in its row; None for the first, before which nothing was asked."""
    value = -float(row.values["target_logprob"][index - 1]) if index else math.nan
    return None if math.isnan(value) else round(value, 3)


def _is_listed(row: Row, position: int) -> bool:
    if "topk_indices" not in row.values:
        return True
    index = int(row.kept_T[:position].sum())
    return bool((row.values["topk_indices"][index] == row.targets[position]).any())
