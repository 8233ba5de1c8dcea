"""Rows of `load_dataset` → the batch that losses and trainers take.

In:   a list of rows, as a loader gives it to its `collate_fn`: dictionaries of arrays, tensors or lists.
Out:  a dictionary of tensors: what `Batches` gives, and what models of transformers take (`labels`, `attention_mask`).

How:  the rows become `Rows`, which are projected, padded and packed by the functions of `Batches`: the same values, so the same losses. Which
      token follows a row's last one is all that a row alone does not tell. It is the end of the sequence where the row is too short to have
      been cut, else NO_TARGET; `Batches` looks into the next row. A loss on distributions does not depend on it.

Cost: two copies. One worker gives 350,000 tokens/s at k = 50 from arrays or tensors, most of the time for `load_dataset`; from lists,
      which it gives without `with_format`, 40,000.

Shape suffixes: B rows of a batch, T positions of one, R rows of a dataset, N positions of all of them, K values a position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from logit_dataset.batches import Piece, Taken, assemble, best_slot, pieces_of
from logit_dataset.load import LogitDataset, check_manifest, load_manifest
from logit_dataset.rows import IDS, NO_TARGET, Array, Projection, Rows, at_their_places, learned
from logit_dataset.schema import COMPLETION_MASK, Layout, columns, shortest_open

SEVERAL = (
    *("topk_indices", "topk_logprobs", "tail_indices", "tail_logprobs", "logprobs"),
    "hidden_states",
)
"""Columns of several values a token, of which a dataset may hold completions' positions only."""
KNOWN = (
    *("input_ids", "completion_mask", *SEVERAL, "tail_logprob", "target_logprob", "logsumexp"),
    "entropy",
)
"""Columns that have a place for every position, or the row is wrong. Any other column is taken if it has."""
MADE = (
    *("target_ids", "mask", "sequence_ids", "position_ids", "labels", "attention_mask"),
    *("row_ids", "row_lengths"),
)
"""What is made here: a column of that name is not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitCollator:
    """Collate rows of a logit dataset, as `collate_fn` or `data_collator`. The rows can be filtered, shuffled, split or interleaved.

    A batch holds what `Batches` describes, with integers in int64 and probabilities in the type of the rows, and

    - `labels` [B, T] int64: labels for models of transformers, which shift them themselves. A position holds its own token if that token is
      the target of the position before, and −100 otherwise: at the first position of a sequence, in padding and, for a dataset with
      completions, outside the completions;
    - `attention_mask` [B, T] int64: 1 at tokens, 0 in padding. It is absent with `packed`: models of transformers that get one ignore
      `position_ids`, and sequences attend to each other (`Batches` says what else they need).

    With `transformers.Trainer` and its subclasses, set `remove_unused_columns=False`; otherwise the distributions never reach the collator.
    """

    length: int | None = None
    """T of every batch; None: the longest row of each batch."""
    packed: bool = False
    """Fill each row with several sequences, up to `length`. Without `length`, put all sequences into one row without padding."""
    split_long: bool = False
    """Cut sequences longer than `length` into pieces. Otherwise they are an error."""
    prompt_targets: bool = False
    """For a dataset with completions, keep prompt tokens in `target_ids` and `labels`."""
    projection: Projection | None = None
    """Projection into the student's vocabulary."""
    number_rows: bool = False
    """Add `row_ids` [B, T] int64, the index of the input row at each position (−1 in padding), and `row_lengths`, the number of positions of
    each row. After cutting and packing, nothing else tells.
    """
    eos_token_id: int | None = None
    """The token that follows a document."""
    shortest_open: float = 0.0
    """A row of at least this length may continue in another row."""
    vocab_size: int | None = None
    """V of the teacher; ids from V on are refused."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Values per position of each column; needed for list rows in a batch without completions."""

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ValueError(f"length is {self.length}, expected 1 or more")
        if self.split_long and self.length is None:
            raise ValueError("split_long needs a length; give length=1024, for example")

    @classmethod
    def of(cls, source: Any, *, revision: str | None = None, **options: Any) -> Self:
        """Make a collator that knows a dataset's vocabulary and sequence ends.

        Args:
            source: the dataset's directory or its name on the Hub (only the manifest is read), the manifest itself, or a LogitDataset, whose
                projection and prompt_targets are taken over. Rows from `load_dataset` are accepted too, but tell neither the end-of-sequence
                token nor the vocabulary: the target of every last position is then −100.
            revision: tag, branch or commit on the Hub.
            options: fields of the collator.

        Raises:
            ValueError: the dataset does not exist, or its manifest cannot be read.
        """
        if isinstance(source, LogitDataset):
            own = {"projection": source.projection, "prompt_targets": source.prompt_targets}
            return cls.of(source.manifest, **{**own, **options})
        if isinstance(source, str | Path):
            source = load_manifest(source, revision=revision)
        if isinstance(source, Mapping) and "shards" in source:
            check_manifest(dict(source), "this dataset")
            layout = Layout.of(source["recipe"], source["teacher"])
            known = {
                "eos_token_id": source["teacher"]["eos_token_id"],
                "shortest_open": shortest_open(source),
                "vocab_size": source["teacher"]["vocab_size"],
                "widths": {c.name: layout.width(c) for c in columns(layout) if "," in c.shape},
            }
            return cls(**{**known, **options})
        features = getattr(source, "features", None)
        if features is None:
            raise ValueError(
                f"{type(source).__name__} does not identify a dataset; give its directory, its name on the Hub, or what load_dataset "
                "gave of one split"
            )
        shapes = {name: getattr(feature, "shape", None) for name, feature in features.items()}
        widths = {n: shape[1] for n, shape in shapes.items() if shape and len(shape) == 2}
        return cls(**{"widths": widths, **options})

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of rows.

        Raises:
            ValueError: columns are missing or inconsistent, an id is outside the vocabulary, or a row is longer than `length`.
        """
        flat = self._flat(rows)
        flat = self.projection(flat) if self.projection else flat
        if self.number_rows:
            flat.columns["row_ids"] = np.repeat(np.arange(len(flat.lengths_R)), flat.lengths_R)
        pieces = pieces_of(flat, self.length if self.split_long else None)
        pieces = pieces or [Piece(flat, 0, 0)]  # a projection may leave all out
        longest = max(piece.length for piece in pieces)
        if longest > (self.length or longest):
            raise ValueError(
                f"a row has {longest} tokens, more than length = {self.length}; choose a length of {longest} or more, or "
                "split_long=True"
            )
        batch = assemble(self._places(pieces), self.length or (None if longest else 1))
        batch |= {n: v.astype(np.int64) for n, v in batch.items() if v.dtype.kind == "i"}
        sequences, labels = batch["sequence_ids"], np.full_like(batch["target_ids"], NO_TARGET)
        goes_on = (sequences[:, 1:] == sequences[:, :-1]) & (sequences[:, 1:] >= 0)
        labels[:, 1:][goes_on] = batch["target_ids"][:, :-1][goes_on]
        batch["labels"] = labels
        if self.number_rows:
            batch["row_lengths"] = flat.lengths_R
        if not self.packed:
            batch["attention_mask"] = (sequences >= 0).astype(np.int64)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _places(self, pieces: list[Piece]) -> list[Taken]:
        if not self.packed:
            return [(piece, row, 0) for row, piece in enumerate(pieces)]
        length = self.length or sum(piece.length for piece in pieces)
        free: list[int] = []
        taken: list[Taken] = []
        # The longest first, which leaves the least room empty; with room for all, as they come.
        for piece in sorted(pieces, key=lambda piece: -piece.length if self.length else 0):
            slot = best_slot(free, piece.length)
            if slot is None:
                slot = len(free)
                free.append(length)
            taken.append((piece, slot, length - free[slot]))
            free[slot] -= piece.length
        return taken

    def _flat(self, rows: Sequence[Mapping[str, Any]]) -> Rows:
        """The columns of some rows, one row after the other."""
        _check_columns(rows)
        parts = {
            name: [_array(row[name], name) for row in rows]
            for name in rows[0]
            if name not in MADE and not isinstance(rows[0][name], str | int | float | None)
        }
        lengths = [len(part) for part in parts["input_ids"]]
        lengths_R = np.array(lengths, dtype=np.int64)
        if not lengths_R.all():
            raise ValueError("a row has no tokens; filter it out")
        values: dict[str, Array] = {}
        learned_N, learned_R = np.ones(lengths_R.sum(), np.bool_), lengths_R
        has_completions = COMPLETION_MASK.name in parts
        if has_completions:
            masks = _joined(parts[COMPLETION_MASK.name], COMPLETION_MASK.name, None, lengths)
            learned_N, learned_R = learned(masks, lengths_R)
        for name, arrays in parts.items():
            found = [len(array) if array.ndim else -1 for array in arrays]
            width = self.widths.get(name)
            if name in SEVERAL and found != lengths and found == learned_R.tolist():
                values[name] = _joined(arrays, name, width, found)
                self._check_ids(values[name], name)
                values[name] = at_their_places(values[name], learned_N, name)
            elif name in KNOWN or _is_per_token(arrays, lengths):
                values[name] = _joined(arrays, name, width, lengths)
                self._check_ids(values[name], name)
        targets_N = np.append(values["input_ids"][1:], NO_TARGET)
        last_R = np.full(len(lengths), NO_TARGET)
        if self.eos_token_id is not None:
            last_R[lengths_R < self.shortest_open] = self.eos_token_id
        targets_N[lengths_R.cumsum() - 1] = last_R
        values["target_ids"] = targets_N
        if has_completions:
            values["mask"] = learned_N
            if not self.prompt_targets:
                values["target_ids"] = np.where(learned_N, targets_N, NO_TARGET)
        return Rows(lengths_R=lengths_R, columns=values)

    def _check_ids(self, ids: Array, name: str) -> None:
        if name not in IDS or not ids.size:
            return
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or (self.vocab_size is not None and most >= self.vocab_size):
            expected = "0 or more" if self.vocab_size is None else f"0 to {self.vocab_size - 1}"
            raise ValueError(
                f"{name} holds the id {least if least < 0 else most}, expected {expected}; the dataset is damaged, or is another one "
                "than the collator was made for"
            )


def _check_columns(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        raise ValueError("there are no rows to make a batch of")
    names = set(rows[0])
    for row in rows:
        if set(row) != names:
            differing = sorted(names ^ set(row))
            raise ValueError(f"some rows have {', '.join(differing)} and others do not")
    whole, listed = {"logprobs"}, {"topk_indices", "topk_logprobs", "tail_logprob"}
    if "input_ids" not in names or not (names >= whole or names >= listed):
        missing = sorted(({"input_ids"} | listed) - names)
        raise ValueError(
            f"the rows have no {', '.join(missing)} (they have {', '.join(sorted(names)) or 'nothing'}); a Trainer removes what its model "
            "does not name unless remove_unused_columns=False, and TRL's packing removes it too"
        )


def _array(value: Any, name: str) -> Array:
    """A value of a row in one of four types: int64, bool, float32, or float16 where it comes so."""
    if isinstance(value, Tensor):
        value = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.array(None)
    if array.dtype.kind in "iu":
        return array.astype(np.int64, copy=False)
    if array.dtype == np.float64:
        return array.astype(np.float32)
    if name in KNOWN and array.dtype.kind not in "bf":
        raise ValueError(f"{name} does not have the same number of values at every position")
    return array


def _is_per_token(arrays: list[Array], lengths: list[int]) -> bool:
    """Whether a column that the schema does not know has numbers for every position."""
    is_number = all(array.dtype.kind in "biuf" and array.ndim for array in arrays)
    if not is_number or [len(array) for array in arrays] != lengths:
        return False
    return len({array.shape[1:] for array in arrays}) == 1


def _joined(arrays: list[Array], name: str, width: int | None, expected: list[int]) -> Array:
    """[N] or [N, K] of all rows."""
    for row, (array, length) in enumerate(zip(arrays, expected, strict=True)):
        if not array.ndim or len(array) != length:
            raise ValueError(
                f"row {row} of the batch has {len(array) if array.ndim else 'no'} positions in {name}, expected {length}; columns are "
                "cut together or not at all (truncation by a trainer cuts input_ids alone)"
            )
    kept = [array for array in arrays if len(array)]
    if not kept and name in SEVERAL and width is None:
        raise ValueError(
            f"no row of this batch has a completion, so that the number of values in {name} is not known; make the collator with "
            "LogitCollator.of(…)"
        )
    if not kept:
        return np.zeros((0, width or 0), np.int64 if name in IDS else np.float32)
    shapes = {array.shape[1:] for array in kept}
    if len(shapes) > 1 or (name in SEVERAL and width is not None and shapes != {(width,)}):
        found = ", ".join(sorted(str(shape[0]) if shape else "1" for shape in shapes))
        raise ValueError(
            f"{name} has {found} values a position, expected {width or 'one number in all rows'}; the dataset is another one than the "
            "collator was made for"
        )
    return np.concatenate(kept)
