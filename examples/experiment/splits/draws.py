"""How a token's bytes are divided between the teacher's K most probable ids and M tokens drawn from all others.

In:   what the teacher says at a position, and the uniform numbers of the builder (by seed, document and position).
Out:  for every K of HEADS the mass outside the top K, and MOST_DRAWS ids drawn from there, as a build with `top_k = K` would
      draw them; K = 0 draws from the whole distribution. They are made once, in the one pass of the teacher that `truth` makes,
      and stay the same in every epoch, seed and arm. A split K + M takes the first M: so all splits of a K share their draws.

Cost: 0.1 ms a position for each K.

Shape suffixes: P positions, V vocabulary, K top-k, S draws.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from builder.capture.draws import draw, uniforms
from builder.capture.ranking import WIDE
from logit_dataset.rows import Rows
from logit_dataset.schema import FLOAT16_MIN

HEADS = (0, 1, 4, 9, 16, 50)
MOST_DRAWS = 50
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Split:
    """K exact entries and M draws from what is outside of them."""

    top_k: int
    num_draws: int

    def __str__(self) -> str:
        """As in names of files."""
        return f"{self.top_k}+{self.num_draws}"


class SplitDraws:
    """The files of a directory that hold, for every K, the tail's mass [N] and ids from there [N, MOST_DRAWS]."""

    def __init__(self, directory: Path, num_positions: int | None = None) -> None:
        """Open them to read; or to write, where `num_positions` says how many there will be."""
        self.tails, self.draws = (
            {k: _open(directory / f"{name}-{k}.npy", num_positions, *kind) for k in HEADS}
            for name, kind in (("tail", ("f2", ())), ("draws", ("i4", (MOST_DRAWS,))))
        )

    def fill(self, here: Array, logp_PV: Tensor, top_PK: Tensor, uniforms_PS: Tensor) -> None:
        """Store what is known of some positions.

        Args:
            here: their rows in the files.
            logp_PV: log-probabilities of the whole vocabulary.
            top_PK: the most probable ids, by rank, as many as the largest K.
            uniforms_PS: numbers from `document_uniforms`.
        """
        tail_PV = torch.nn.functional.pad(logp_PV.exp(), (0, -logp_PV.shape[1] % WIDE))
        for k in HEADS:
            tail_PV.scatter_(1, top_PK[:, :k], 0.0)
            self.tails[k][here] = tail_PV.sum(-1).log().clamp(min=FLOAT16_MIN).half().numpy()
            drawn_PS = draw(uniforms_PS, tail_PV, block_size=WIDE)
            self.draws[k][here] = drawn_PS.clamp(max=logp_PV.shape[1] - 1).int().numpy()

    def flush(self) -> None:
        """What was filled is on the disk from now on."""
        for file in (*self.tails.values(), *self.draws.values()):
            file.flush()

    def told(self, split: Split, rows: Rows) -> Rows:
        """Rows of a dataset of the largest K, as that of a split would hold them."""
        k, at = split.top_k, rows.columns["position"]
        columns = {
            **rows.columns,
            "topk_indices": rows.columns["topk_indices"][:, :k],
            "topk_logprobs": rows.columns["topk_logprobs"][:, :k],
            "tail_logprob": self.tails[k][at],
            "tail_indices": self.draws[k][at, : split.num_draws],
        }
        del columns["tail_logprobs"]
        return Rows(lengths_R=rows.lengths_R, columns=columns)


def document_uniforms(seed: int, ids: Iterable[str], chunks: Array, lengths: Array) -> Tensor:
    """[N, MOST_DRAWS]: the numbers that the builder takes for these rows, one after the other."""
    parts = [
        uniforms(seed, name, int(chunk), num_positions=int(length), count=MOST_DRAWS)
        for name, chunk, length in zip(ids, chunks, lengths, strict=True)
    ]
    return torch.cat(parts)


def _open(path: Path, num_positions: int | None, dtype: str, shape: tuple[int, ...]) -> Array:
    if num_positions is None:
        found: Array = np.load(path, mmap_mode="r")
        return found
    return open_whole(path, (num_positions, *shape), dtype)


def open_whole(path: Path, shape: tuple[int, ...], dtype: str) -> Array:
    """A file of an array to write to, as it was left if it is there and has this shape."""
    if path.exists():
        found: Array = np.load(path, mmap_mode="r+")
        if found.shape == shape:
            return found
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)


def nested(values: Array, lengths: Array) -> pa.ListArray:
    """Values [N] or [N, K] → a list a row."""
    inner = pa.array(values.reshape(-1))
    if values.ndim == 2:
        stops = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        inner = pa.ListArray.from_arrays(pa.array(stops), inner)
    return pa.ListArray.from_arrays(pa.array(np.append(0, lengths.cumsum()).astype("i4")), inner)
