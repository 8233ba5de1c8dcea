"""Sequences and what has come back of their batches → blocks of rows, each value where its sequence is.

In:   the sequences of a window, the batches that they were put into, and the statistics of each batch.
Out:  a Block in the order of the sequences; what of a batch is one sequence's; an error that names the document and position of a
      value that is not finite.

How:  a batch holds all positions of its first sequence, then of the second, and so on. Columns of several values may be of the positions
      in the loss mask only. What runs beside the teacher is made by numpy: two threads with torch's OpenMP threads each would be more
      than there are cores, and then those of the teacher sleep between two operations instead of waiting for the next
      (bfloat16 on two cores: 4 % of a build).

Cost: one copy of a window's statistics, 6 bytes · T · K, and one of a column.

Shape suffixes: N positions, M draws from the tail, C positions whose columns of several values are kept.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from builder.capture.distribution import Distribution
from builder.corpus.sequences import Sequence
from builder.dataset.shards import Block
from logit_dataset.schema import FLOAT16_MIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the device is given."""

    indices: list[int]
    """Of its sequences in the window."""
    sequences: list[Sequence]
    targets_N: Tensor
    uniforms_NM: Tensor | None
    kept_C: Tensor | None
    """The positions whose columns of several values are kept; None for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Consecutive sequences, and the batches of them that have come back so far."""

    sequences: list[Sequence]
    batches: list[Batch]
    """In the order in which they are launched."""
    loss_only: bool
    """Whether columns of several values are of positions in the loss mask only."""
    landed: list[tuple[list[int], Distribution]] = field(default_factory=list)

    def block(self) -> Block:
        """Its rows, once all batches are back; may be called on any thread, once."""
        return _in_order(self)


def part_of(
    distribution: Distribution, sequences: list[Sequence], index: int, *, loss_only: bool
) -> Distribution:
    """What a batch's Distribution holds of one of its sequences."""

    def here(lengths: list[int]) -> slice:
        start = sum(lengths[:index])
        return slice(start, start + lengths[index])

    all_N = here([len(sequence.token_ids) for sequence in sequences])
    kept_C = here([len(sequence.loss_positions) for sequence in sequences]) if loss_only else all_N
    return {
        name: column[all_N if column.ndim == 1 else kept_C] for name, column in distribution.items()
    }


def _in_order(window: Window) -> Block:
    """The block of a complete window: positions are brought back from the order of batches to that of sequences."""
    order_N = order_C = _order(window, [len(sequence.token_ids) for sequence in window.sequences])
    if window.loss_only:
        order_C = _order(window, [len(sequence.loss_positions) for sequence in window.sequences])
    landed = [distribution for _, distribution in window.landed]
    window.landed.clear()
    ordered = {}
    for name in list(landed[0]):
        column = np.concatenate([distribution.pop(name).numpy() for distribution in landed])
        order = order_N if column.ndim == 1 else order_C
        ordered[name] = torch.from_numpy(column.take(order, axis=0))
    return Block(sequences=window.sequences, distribution=ordered)


def _order(window: Window, lengths: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where each value of the sequences, of which they have so many, stands among those that have landed."""
    starts, start = [0] * len(lengths), 0
    for indices, _ in window.landed:
        for i in indices:
            starts[i] = start
            start += lengths[i]
    return np.concatenate(
        [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    )


def loss_positions(sequences: list[Sequence]) -> Tensor:
    """Indices of the positions in the loss mask among all positions of some sequences, [C]."""
    found, start = [], 0
    for sequence in sequences:
        found += [start + position for position in sequence.loss_positions]
        start += len(sequence.token_ids)
    return torch.tensor(found, dtype=torch.long)


def check_finite(distribution: Distribution, sequences: list[Sequence], *, loss_only: bool) -> None:
    """See that all statistics of a batch are numbers.

    Raises:
        ValueError: one is not (names its document and position), or a hidden state is beyond float16.
    """
    bad = (~distribution["logsumexp"].isfinite()).nonzero()
    if len(bad):
        where = _place(int(bad[0]), sequences)
        raise ValueError(
            f"the teacher yields NaN or infinity for {where}; try another teacher.dtype, or remove the document"
        )
    if "hidden_states" not in distribution:
        return
    bad = (~distribution["hidden_states"].isfinite().all(-1)).nonzero()
    if len(bad):
        position = int(loss_positions(sequences)[bad[0]]) if loss_only else int(bad[0])
        raise ValueError(
            f"a hidden state for {_place(position, sequences)} is beyond {-FLOAT16_MIN:.0f}, the largest float16, so hidden states of this teacher cannot be stored; set output.hidden_states to false"
        )


def _place(position: int, sequences: list[Sequence]) -> str:
    """Document, chunk and position of a position of a batch."""
    for sequence in sequences:
        if position < len(sequence.token_ids):
            break
        position -= len(sequence.token_ids)
    return f"document {sequence.document_id!r} (chunk {sequence.chunk_index}, position {position})"
