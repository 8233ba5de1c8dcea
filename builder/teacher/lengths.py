"""A model's configuration → which sequences may share a batch: those that others do not change by being longer.

In:   a model of transformers.
Out:  its Reach; and, for a model that remembers the lengths of earlier batches, a way to make it forget.

How:  under causal attention, padding on the right changes nothing, and most models take any lengths together. But some choose
      numbers by the length of the longest sequence in the batch:

      LongRoPE (Phi-3, Phi-3.5, Phi-4-mini, PhiMoE, MiniCPM) has two sets of rotary factors, and takes the second one where the batch
      is longer than `original_max_position_embeddings`. Here that is a border, which no batch straddles.

      Dynamic NTK scales rotary frequencies by the length itself, beyond `max_position_embeddings`. Longer sequences share batches with
      those of their own length only. transformers also keeps the frequencies of the longest batch so far, so they are reset.

      Sparse attention lets each position see the so many others that score highest (`index_topk` of DeepSeek V3.2 and V4, GLM-MoE-DSA
      and others, `keep_window_size` of Doge). Many scores are equal, and which of these are taken depends on how many there are. So
      beyond that number, again, equal lengths only.

      Two are refused. A Reformer sorts positions into buckets, by random rotations, and by the first length that it meets. A BigBird
      attends in blocks, which see later tokens, until it meets a short sequence.

      What is not known here, a build notices (`capture.guard`).
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

LENGTH_NAMES = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions"),
    *("seq_length", "max_seq_length", "n_ctx", "model_max_length"),
)  # fmt: skip
"""What configs call the longest sequence: the first is the name in transformers, or stands for another one there (attribute maps)."""

ANY = sys.maxsize
"""Beyond every length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How long a batch may be for a sequence in it: a function of the sequence's own length."""

    borders: tuple[int, ...] = ()
    """Lengths up to which, and beyond which, sequences may share a batch, but not across them."""
    exact_beyond: int = ANY
    """Longer sequences share a batch with those of their own length only."""

    def __call__(self, length: int) -> int:
        """The longest sequence with which one of this length may share a batch; those with the same answer may share one."""
        if length > self.exact_beyond:
            return length
        return min(b for b in (*self.borders, self.exact_beyond, ANY) if b >= length)


ANYWHERE = Reach()
"""Of an ordinary model, whose values do not depend on the length of a batch."""


def max_length_of(config: Any) -> int | None:
    """Longest sequence that a model was made for, in tokens, where its configuration says so."""
    # Of a config with parts (vision, audio), the text's counts.
    text = config.get_text_config(decoder=True)
    limits = (getattr(text, name, None) for name in LENGTH_NAMES)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def reach_of(model: Any) -> Reach:
    """How the lengths of a model's batches may be mixed.

    Raises:
        ValueError: its values change with the length of a batch in a way that no choice of batches mends.
    """
    config = model.config
    if config.model_type == "reformer" and "lsh" in config.attn_layers:
        raise ValueError(
            f"{type(model).__name__} attends within buckets that it chooses at random, and by the length of the first sequences that "
            "it meets, so that no sequence has one distribution; use another teacher"
        )
    if config.model_type == "big_bird" and config.attention_type != "original_full":
        raise ValueError(
            f"{type(model).__name__} attends in blocks, which see later tokens, until it meets a short sequence; set attention_type to "
            '"original_full" in its config.json, or use another teacher'
        )
    borders: set[int] = set()
    exact_beyond = ANY
    for section, positions, original in _sections(config.to_dict(), None, None):
        kind = str(section.get("rope_type") or section.get("type") or "")
        if "short_factor" in section or kind in ("longrope", "su"):
            border = section.get("original_max_position_embeddings") or original or positions
            if border:
                borders.add(int(border))
        elif "dynamic" in kind and positions:
            exact_beyond = min(exact_beyond, positions)
        for listed in (section.get("index_topk"), section.get("keep_window_size")):
            if isinstance(listed, int):
                # DeepSeek V4 scores one entry for so many positions.
                rates = (section.get("compress_rates") or {}).values()
                exact_beyond = min(exact_beyond, listed * min(rates, default=1))
    return Reach(borders=tuple(sorted(borders)), exact_beyond=exact_beyond)


def _sections(
    values: Any, positions: int | None, original: int | None
) -> Iterator[tuple[dict[str, Any], int | None, int | None]]:
    """Every dictionary in a configuration, with the two limits on positions that hold where it stands."""
    if isinstance(values, dict):
        positions = values.get("max_position_embeddings") or positions
        original = values.get("original_max_position_embeddings") or original
        yield values, positions, original
        values = list(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            yield from _sections(value, positions, original)


def forgetting(model: nn.Module) -> Callable[[], None]:
    """What makes a model forget the lengths of earlier batches: the state that dynamic NTK keeps in transformers."""
    kept = [module for module in model.modules() if _is_dynamic(module)]

    def forget() -> None:
        for module in kept:
            # There may be several, each for a kind of layers, by which its name begins.
            for name, original in list(module.named_buffers(recurse=False)):
                if name.endswith("original_inv_freq"):
                    kind = name.removesuffix("original_inv_freq")
                    module.register_buffer(f"{kind}inv_freq", original.clone(), persistent=False)
                    setattr(module, f"{kind}max_seq_len_cached", module.original_max_seq_len)

    return forget


def _is_dynamic(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else [kinds]
    return hasattr(module, "original_max_seq_len") and any("dynamic" in str(k) for k in named)
