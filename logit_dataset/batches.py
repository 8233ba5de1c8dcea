"""Row groups → batches: shuffled, shared among processes, packed or padded, resumable to the exact next batch.

In:   the row groups of a dataset, and a function that decodes one.
Out:  dictionaries of tensors in stored types; no Python object is made for a token.

How:  an epoch is a list of blocks. The row groups are put in an order (files shuffled, then the row groups of each), every
      `world_size`-th belongs to this process, and consecutive ones form blocks of BUFFER_TOKENS, whose rows are shuffled together. All of that
      is a function of the seed and the epoch, so a place in it is three numbers: epoch, block, row. Threads decode the next
      block while the trainer works on this one; what they raise is raised again here.

Cost: two blocks in memory, and what is decoded ahead, AHEAD blocks (a block is 43 MB at k = 50, 270 MB with whole distributions); in stored
      order only what is decoded ahead. Rows are copied once, from Arrow's memory into the batch.

Shape suffixes: B rows of a batch, T their length, K values a position, P pieces (sequences, or parts of long ones).
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from logit_dataset.rows import NO_PROBABILITY, NO_TARGET, RowGroup, Rows

BUFFER_TOKENS = 131_072
"""Rows are shuffled among this many tokens: four row groups, so of up to four places in a file."""
BUFFER_VALUES = 2**27
"""Limit on T · K of a block, for whole distributions: as many row groups."""
READERS = 2
"""Threads that decode row groups; each lets Arrow use all cores. Four were slower on two cores."""
AHEAD = 1.5
"""Blocks that are decoded before they are wanted. More than one, else threads would wait while the last row group of one is decoded."""
STORED_AHEAD = 0.75
"""The same in stored order, where no block is waited for: three row groups. More would be written to memory and read from there again."""
PADDING = {"target_ids": NO_TARGET, "sequence_ids": -1, "row_ids": -1, **NO_PROBABILITY}
"""What stands where no token is; 0 in all other columns: losses of others look all ids up before they multiply by a mask."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A sequence, or a part of one."""

    rows: Rows
    start: int
    length: int


Taken = tuple[Piece, int, int]
"""A piece, the row of a batch that it goes into, and its place there."""


class Batches(IterableDataset[dict[str, Tensor]]):
    """Iterate over batches. Each pass is one epoch in an order of its own; a pass that was interrupted continues where it stopped.

    A batch has, for B rows of T positions:

    - every column with one or several values per token: [B, T] or [B, T, K], in its stored type;
    - `target_ids` [B, T] int32 (int64 with `int64_targets`): the token that follows each position. It is −100 where that token is
      unknown, in padding, and, for a dataset with completions, outside the completions (unless loaded with `prompt_targets`);
    - `mask` [B, T] bool: the loss mask, True where there is a teacher distribution to learn. It is also True at the last position of
      a sequence: that distribution predicts the document's next token or its end, not the sequence packed behind it. For a dataset
      with completions, it is True only where the distribution predicts a completion token of the same sequence;
    - `sequence_ids` [B, T] int32: 0, 1, … for the sequences packed in a row, −1 in padding. A position must attend only to its own
      sequence;
    - `position_ids` [B, T] int32: 0, 1, … within each sequence; the count continues in padding.

    Positions without a distribution carry no probability. In padding, every log-probability, including `target_logprob` and
    `tail_logprob`, is −65504, whose exponential is 0; ids and all other columns are 0. So a loss that ignores the mask adds nothing
    there, and one that multiplies by the mask gets no NaN. The same holds for tokens whose distribution was left out (by
    `completions_only`, or by a projection between two teacher tokens), except that their `topk_indices` are −1, an empty place, and that
    columns with one value per token keep their stored values. `target_logprob` is NaN where the file says that nothing follows, at the
    end of a document.

    Models of transformers keep packed sequences apart only if you pass `position_ids`, no attention mask, and `use_cache=False`. By
    default they use a cache, and then **sequences attend to each other** without a warning. Flash attention keeps them apart only in
    batches of one row: use batch_size=1 and a length of several sequences.
    """

    def __init__(
        self,
        *,
        row_groups: Sequence[RowGroup],
        read: Callable[[RowGroup], Rows],
        widest: int,
        identity: dict[str, Any],
        batch_size: int,
        length: int | None,
        packed: bool,
        split_long: bool,
        seed: int | None,
        rank: int,
        world_size: int,
        int64_targets: bool = False,
    ) -> None:
        """See `LogitDataset.batches`."""
        if batch_size < 1 or (length is not None and length < 1):
            raise ValueError(f"batch_size is {batch_size} and length {length}, expected 1 or more")
        if (packed or split_long) and length is None:
            raise ValueError("packed and split_long need a length; give length=1024, for example")
        if seed is not None and seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more, or None for the stored order")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1} (world_size − 1)")
        if world_size > len(row_groups):
            raise ValueError(
                f"{len(row_groups)} row groups cannot be shared by {world_size} processes; use fewer, select rows of "
                "more row groups, or build the dataset with a smaller output.shard_tokens"
            )
        self._row_groups, self._read = row_groups, read
        self._batch_size, self._length, self._packed = batch_size, length, packed
        self._split_long, self._seed = split_long, seed
        self._rank, self._world_size = rank, world_size
        self._int64_targets = int64_targets
        self._buffer_tokens = min(BUFFER_TOKENS, BUFFER_VALUES // widest)
        self._settings = {
            **identity,
            **{"batch_size": batch_size, "length": length, "packed": packed},
            **{"split_long": split_long, "seed": seed, "rank": rank, "world_size": world_size},
            "buffer_tokens": self._buffer_tokens,
        }
        self._epoch, self._block, self._row = 0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return which batch comes next, as plain values that JSON can store.

        Pass batches to the training directly. A loader that prefetches them, as accelerate's does, moves this state ahead of the training, and
        a resumed run skips the prefetched batches.
        """
        position = {"epoch": self._epoch, "block": self._block, "row": self._row}
        return {**self._settings, **position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of batches of the same dataset with the same settings.

        Raises:
            ValueError: the state belongs to another dataset or other settings; the message names both.
        """
        for name, ours in self._settings.items():
            if state.get(name) != ours:
                raise ValueError(
                    f"the saved state has {name} = {state.get(name)!r}, these batches {ours!r}; create them with the same arguments"
                )
        self._epoch, self._block, self._row = state["epoch"], state["block"], state["row"]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the rest of the current epoch.

        Raises:
            ValueError: a row cannot be read, or is longer than `length`; or the loader that asks for batches would lose some of them.
        """
        if get_worker_info() is not None:
            raise ValueError(
                "these batches are read ahead by a thread of their own, and workers would repeat them; use num_workers=0"
            )
        _check_loader()
        return self._rest()

    def _rest(self) -> Iterator[dict[str, Tensor]]:
        taken: list[Taken] = []
        free = self._free()
        for piece, place in self._pieces():
            if piece.length > (self._length or piece.length):
                raise ValueError(
                    f"a row has {piece.length} tokens, more than length = {self._length}; choose a length of "
                    f"{piece.length} or more, or split_long=True"
                )
            slot = self._slot(free, piece.length, len(taken))
            if slot is None:
                self._block, self._row = place
                yield self._tensors(taken)
                taken, free = [], self._free()
                slot = 0
            offset = (self._length or 0) - free[slot] if self._packed else 0
            taken.append((piece, slot, offset))
            free[slot] -= piece.length
        self._epoch, self._block, self._row = self._epoch + 1, 0, 0
        if taken:
            yield self._tensors(taken)

    def _free(self) -> list[int]:
        return [self._length or 0] * self._batch_size

    def _slot(self, free: list[int], length: int, num_taken: int) -> int | None:
        """Which row of the batch a piece goes into: the fullest that has room; None if there is none."""
        if not self._packed:
            return num_taken if num_taken < self._batch_size else None
        return best_slot(free, length)

    def _blocks(self) -> list[list[RowGroup]]:
        """This process's blocks of the current epoch."""
        groups = list(self._row_groups)
        if self._seed is not None:
            generator = np.random.default_rng((self._seed, self._epoch))
            shuffled = [groups[i] for i in generator.permutation(len(groups))]
            # Files in the order in which they first come up in a shuffle, their row groups in the order of that shuffle.
            rank_of: dict[str, int] = {}
            for group in shuffled:
                rank_of.setdefault(group.file, len(rank_of))
            groups = sorted(shuffled, key=lambda group: rank_of[group.file])
        blocks: list[list[RowGroup]] = []
        tokens = 0
        for group in groups[self._rank :: self._world_size]:
            if not blocks or tokens + group.num_tokens > self._buffer_tokens:
                blocks.append([])
                tokens = 0
            blocks[-1].append(group)
            tokens += group.num_tokens
        return blocks

    def _pieces(self) -> Iterator[tuple[Piece, tuple[int, int]]]:
        """The pieces of the rest of the epoch, each with its place (block, row)."""
        blocks, first, row = self._blocks(), self._block, self._row
        decoded = self._decoded(group for block in blocks[first:] for group in block)
        for index in range(first, len(blocks)):
            # In stored order nothing is waited for: a row group is given as soon as it is there, and is not kept.
            pieces: Iterable[Piece] = chain.from_iterable(islice(decoded, len(blocks[index])))
            if self._seed is not None:
                block = list(pieces)
                key = (self._seed, self._epoch, self._rank, index)
                order = np.random.default_rng(key).permutation(len(block))
                pieces = (block[place] for place in order)
            for place, piece in enumerate(pieces):
                if place >= row:
                    yield piece, (index, place)
            row = 0

    def _decoded(self, groups: Iterable[RowGroup]) -> Iterator[list[Piece]]:
        """The pieces of each row group, which threads decode ahead."""
        upcoming = deque(groups)
        most = int(self._buffer_tokens * (STORED_AHEAD if self._seed is None else AHEAD))
        with ThreadPoolExecutor(READERS, thread_name_prefix="logit-dataset") as pool:
            ahead: deque[tuple[int, Future[list[Piece]]]] = deque()

            def submit() -> None:
                """Have as many row groups decoded as may be ahead; one, however large."""
                room = most - sum(tokens for tokens, _ in ahead)
                while upcoming and (not ahead or upcoming[0].num_tokens <= room):
                    group = upcoming.popleft()
                    room -= group.num_tokens
                    ahead.append((group.num_tokens, pool.submit(self._decode, group)))

            submit()
            while ahead:
                pieces = ahead.popleft()[1].result()
                submit()
                yield pieces

    def _decode(self, group: RowGroup) -> list[Piece]:
        """The pieces of a row group, in stored order. Runs in a thread that reads ahead."""
        return pieces_of(self._read(group), self._length if self._split_long else None)

    def _tensors(self, taken: list[Taken]) -> dict[str, Tensor]:
        batch = assemble(taken, self._length)
        if self._int64_targets:
            batch["target_ids"] = batch["target_ids"].astype(np.int64)
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def _check_loader() -> None:
    """Refuse loaders that take ready batches for rows, and lose some without a word. They tell a dataset nothing, so their frames are read.

    Raises:
        ValueError: a DataLoader collates several batches into one, or accelerate divides them among processes.
    """
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        module, names = frame.f_globals.get("__name__"), frame.f_locals
        loader = names.get("loader") if module == "torch.utils.data.dataloader" else None
        if loader is not None and loader.batch_size not in (None, 1):
            raise ValueError(
                f"these batches are ready, but a DataLoader with batch_size={loader.batch_size} would collate several of them into one; "
                "use DataLoader(batches, batch_size=None), or rows of load_dataset with a LogitCollator"
            )
        if module in ("accelerate.data_loader", "transformers.trainer_pt_utils"):
            owner = names.get("self")
            found = (owner, getattr(owner, "state", None))
            number = max(int(getattr(each, "num_processes", 1)) for each in found)
            if number > 1:
                raise ValueError(
                    f"accelerate would divide the batches of one process among {number}, and leave the others' out; take batches with "
                    "rank= and world_size= as they are, or give it rows of load_dataset with a LogitCollator"
                )


def pieces_of(rows: Rows, most: int | None) -> list[Piece]:
    """The sequences in stored order, cut into pieces of at most so many tokens."""
    pieces = []
    stops = rows.lengths_R.cumsum().tolist()
    for stop, length in zip(stops, rows.lengths_R.tolist(), strict=True):
        step = most or length
        for start in range(stop - length, stop, max(step, 1)):
            pieces.append(Piece(rows, start, min(step, stop - start)))
    return pieces


def best_slot(free: list[int], length: int) -> int | None:
    """The fullest row that has room for so many tokens; None if there is none."""
    fitting = [slot for slot, room in enumerate(free) if room >= length]
    return min(fitting, key=lambda slot: free[slot]) if fitting else None


def assemble(taken: Sequence[Taken], length: int | None) -> dict[str, npt.NDArray[Any]]:
    """A batch of some pieces: every column of theirs, `mask`, `sequence_ids` and `position_ids`.

    Args:
        taken: the pieces, at least one, and where they go.
        length: T; None for the end of the longest row.
    """
    num_rows = 1 + max(slot for _, slot, _ in taken)
    used = [0] * num_rows
    for piece, slot, offset in taken:
        used[slot] = max(used[slot], offset + piece.length)
    length = length or max(used)
    shape = (num_rows, length)
    batch: dict[str, npt.NDArray[Any]] = {}
    for name, values in taken[0][0].rows.columns.items():
        out = np.empty((*shape, *values.shape[1:]), values.dtype)
        for piece, slot, offset in taken:
            source = piece.rows.columns[name]
            out[slot, offset : offset + piece.length] = source[
                piece.start : piece.start + piece.length
            ]
        for slot, end in enumerate(used):
            out[slot, end:] = PADDING.get(name, 0)
        batch[name] = out
    has_token = np.zeros(shape, np.bool_)
    sequence_ids = np.full(shape, PADDING["sequence_ids"], np.int32)
    position_ids = np.empty(shape, np.int32)
    position_ids[:] = np.arange(length, dtype=np.int32)
    counts = [0] * num_rows
    for piece, slot, offset in taken:
        where = slice(offset, offset + piece.length)
        has_token[slot, where] = True
        sequence_ids[slot, where] = counts[slot]
        # Up to the end of the row: what is packed behind overwrites it, and padding counts on.
        position_ids[slot, offset:] = np.arange(length - offset, dtype=np.int32)
        counts[slot] += 1
    batch["mask"] = batch["mask"] & has_token if "mask" in batch else has_token
    return batch | {"sequence_ids": sequence_ids, "position_ids": position_ids}
