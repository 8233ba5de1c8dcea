"""Sequences → blocks of rows: the teacher and its statistics, batch by batch, without waiting for the device.

In:   the sequences of a shard, and the teacher.
Out:  Blocks in the order of the sequences.

How:  sequences are taken a window at a time and sorted by length within it, so that batches carry little padding. The next window is
      taken, and what the device needs of it is made, on a thread of its own; the thread that launches does little else. While
      the device works on a batch, the one before is copied to the host (once, through pinned memory, which torch uses again).
      A complete window is put in order by whoever takes it. Nothing is carried from one shard to the next.

Cost: two windows of statistics on the host, 6 bytes · T · K each.

Shape suffixes: N positions, M draws from the tail, C positions whose columns of several values are kept, D hidden.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from builder.capture.ahead import Ahead
from builder.capture.distribution import Distribution, capture
from builder.capture.draws import uniforms
from builder.capture.guard import FACTOR, NOISE, Guard, distance
from builder.capture.windows import Batch, Window, check_finite, loss_positions, part_of
from builder.corpus.sequences import Sequence, length_sorted_batches
from builder.dataset.shards import Block
from builder.teacher.model import Teacher, to_device
from builder.teacher.precision import Rounded
from logit_dataset.schema import Layout

WINDOW_BATCHES = 8
"""Sequences of this many batches are sorted by length together."""
WINDOW_VALUES = 2**26
"""Limit on T · K of a window, for large K: 400 MB of indices and log-probs. Batches are no larger than their window."""
BATCHES_IN_FLIGHT = 1
"""Launched batches whose results have not been asked for, besides the one being launched."""

Progress = Callable[[int], None]
"""Called with the number of tokens just captured."""
Notice = Callable[[str], None]
"""Called with a line that the user should see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    """A batch that was launched on the device."""

    window: Window
    batch: Batch
    is_last: bool
    """Whether the window is complete with it."""
    arrive: Callable[[], Distribution]
    """Waits for the statistics on the host."""


class Pipeline:
    """Runs a teacher over the sequences of one shard."""

    def __init__(
        self,
        teacher: Teacher,
        *,
        layout: Layout,
        seed: int = 0,
        batch_tokens: int,
        guard: Guard | None = None,
        progress: Progress = lambda _: None,
        notice: Notice = lambda _: None,
    ) -> None:
        """Prepare to run.

        Args:
            teacher: the teacher.
            layout: what is to be stored.
            seed: of the draws from the tail.
            batch_tokens: positions in a batch, padding included.
            guard: says which sequences are run again alone; None for one of this pipeline's own.
            progress: told of captured tokens.
            notice: told of batches that did not fit the device's memory.
        """
        self._teacher = teacher
        self._layout = layout
        self._seed = seed
        self._batch_tokens = batch_tokens
        self._guard = guard or Guard()
        self._progress = progress
        self._notice = notice
        self.halved_batches = 0
        """How many batches did not fit the device's memory and were halved: this can change last bits."""

    @property
    def window_tokens(self) -> int:
        """Tokens of the sequences that are sorted by length together, unless it is a single sequence."""
        return min(WINDOW_BATCHES * self._batch_tokens, WINDOW_VALUES // self._layout.widest)

    def blocks(self, sequences: Iterator[Sequence]) -> Iterator[Block]:
        """The sequences in their order, each with the distributions of its positions.

        Raises:
            ValueError: the teacher yields NaN or infinity, or other values than for the same sequence alone (names the document), or
                one sequence alone does not fit the device's memory.
        """
        return (window.block() for window in self.windows(sequences))

    def windows(self, sequences: Iterator[Sequence]) -> Generator[Window]:
        """The same as complete windows, for those who put them in order elsewhere."""
        in_flight: deque[_Launched] = deque()
        with closing(Ahead(self._windows(sequences), depth=1, name="batches")) as windows:
            for window in windows:
                for launched in self._launched(window):
                    in_flight.append(launched)
                    if len(in_flight) > BATCHES_IN_FLIGHT:
                        yield from self._land(in_flight.popleft())
        while in_flight:
            yield from self._land(in_flight.popleft())

    def _windows(self, sequences: Iterator[Sequence]) -> Iterator[Window]:
        limit = self.window_tokens
        window: list[Sequence] = []
        tokens = 0
        for sequence in sequences:
            if window and tokens + len(sequence.token_ids) > limit:
                yield self._window(window)
                window, tokens = [], 0
            window.append(sequence)
            tokens += len(sequence.token_ids)
        if window:
            yield self._window(window)

    def _window(self, sequences: list[Sequence]) -> Window:
        lengths = [len(sequence.token_ids) for sequence in sequences]
        batches = length_sorted_batches(lengths, self._batch_tokens, self._teacher.reach)
        return Window(
            sequences=sequences,
            batches=[self.batch([sequences[i] for i in indices], indices) for indices in batches],
            loss_only=self._layout.completions_only,
        )

    def batch(self, sequences: list[Sequence], indices: SequenceOf[int] = ()) -> Batch:
        """What the device needs of some sequences."""
        layout = self._layout
        return Batch(
            indices=list(indices),
            sequences=sequences,
            targets_N=torch.from_numpy(
                np.concatenate([s.targets for s in sequences], dtype=np.int64)
            ),
            uniforms_NM=torch.from_numpy(np.concatenate([self._uniforms(s) for s in sequences]))
            if layout.tail_samples
            else None,
            kept_C=loss_positions(sequences) if layout.completions_only else None,
        )

    def _launched(self, window: Window) -> Iterator[_Launched]:
        waiting = deque(window.batches)
        window.batches.clear()
        while waiting:
            batch = waiting.popleft()
            arrive = self._launch(batch)
            if arrive is None:
                middle = len(batch.indices) // 2
                halves = (batch.indices[middle:], batch.indices[:middle])
                waiting.extendleft(
                    self.batch([window.sequences[i] for i in half], half) for half in halves
                )
            else:
                yield _Launched(window=window, batch=batch, is_last=not waiting, arrive=arrive)

    def _launch(self, batch: Batch) -> Callable[[], Distribution] | None:
        """Start the work on a batch; None if it does not fit the device's memory."""
        try:
            return self.start(batch)
        except torch.OutOfMemoryError:
            pass  # what the failed attempt holds is let go with the exception, before the next attempt
        sequences = batch.sequences
        longest = max(len(sequence.token_ids) for sequence in sequences)
        if len(sequences) == 1:
            raise ValueError(
                f"a single sequence of {longest} tokens does not fit in the memory of {self._teacher.device}; choose a "
                "smaller sequences.max_length, or a device with more memory"
            )
        self.halved_batches += 1
        self._notice(
            f"out of memory on {self._teacher.device} with {len(sequences)} sequences of up to {longest} tokens: continuing with "
            "half as many; a smaller sequences.batch_tokens avoids this"
        )
        if self._teacher.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def start(self, batch: Batch) -> Callable[[], Distribution]:
        """Launch a batch; the result waits for its statistics on the host.

        Raises:
            OutOfMemoryError: it does not fit the device's memory.
        """
        return start_copy(self._capture(batch))

    def _capture(self, batch: Batch) -> Distribution:
        """The statistics of a batch, on the device."""
        teacher, layout = self._teacher, self._layout
        ids = [sequence.token_ids for sequence in batch.sequences]
        targets_N, uniforms_NM = batch.targets_N, batch.uniforms_NM
        hidden_ND = teacher.hidden(ids) if layout.hidden_states else None
        pieces: Iterator[Tensor | Rounded]
        if layout.top_k == "all":
            pieces = teacher.logits(ids) if hidden_ND is None else teacher.head(hidden_ND)
        elif hidden_ND is None:
            pieces = teacher.rounded(ids)
        else:
            pieces = teacher.rounded_head(hidden_ND)
        distribution = capture(
            pieces,
            to_device(targets_N, teacher.logits_device),
            top_k=layout.top_k,
            uniforms_NM=None
            if uniforms_NM is None
            else to_device(uniforms_NM, teacher.logits_device),
            draw_logprobs=layout.tail_logprobs,
            temperatures=layout.temperatures,
        )
        if hidden_ND is not None:
            distribution["hidden_states"] = hidden_ND.half().to(teacher.logits_device)
        if batch.kept_C is not None:
            kept_C = to_device(batch.kept_C, teacher.logits_device)
            for name, values in distribution.items():
                if values.ndim == 2:
                    distribution[name] = values.index_select(0, kept_C)
        return distribution

    def _uniforms(self, sequence: Sequence) -> Tensor:
        return uniforms(
            self._seed,
            sequence.document_id,
            sequence.chunk_index,
            num_positions=len(sequence.token_ids),
            count=self._layout.tail_samples,
        )

    def _land(self, launched: _Launched) -> Iterator[Window]:
        """Take a batch in; yields its window when that is complete."""
        distribution = launched.arrive()
        window, sequences = launched.window, launched.batch.sequences
        check_finite(distribution, sequences, loss_only=self._layout.completions_only)
        self._check_alone(distribution, sequences)
        window.landed.append((launched.batch.indices, distribution))
        self._progress(len(distribution["logsumexp"]))
        if launched.is_last:
            yield window

    def _check_alone(self, distribution: Distribution, sequences: list[Sequence]) -> None:
        """Run a sequence of some batches again, without the others, and compare."""
        chosen = self._guard.choose(sequences) if self._teacher.head_only else None
        if chosen is None:
            return
        sequence, loss_only = sequences[chosen], self._layout.completions_only
        dtype = self._teacher.dtype
        limit, noise = NOISE[dtype], 0.0
        try:
            alone = self.start(self.batch([sequence]))()
            found = part_of(distribution, sequences, chosen, loss_only=loss_only)
            if (off := distance(found, alone, dtype)) <= limit:
                return
            # As many positions, by which a GPU chooses how to sum a product.
            positions = len(sequences) * max(len(other.token_ids) for other in sequences)
            copies = [sequence] * (positions // len(sequence.token_ids))
            same = self.start(self.batch(copies))()
            noise = distance(part_of(same, copies, chosen, loss_only=loss_only), alone, dtype)
        except torch.OutOfMemoryError:
            return  # the next batch is under way, too; there will be others to look at
        if not off <= max(limit, FACTOR * noise):
            raise ValueError(
                f"document {sequence.document_id!r} (chunk {sequence.chunk_index}): its log-probabilities in a batch differ from those alone "
                f"by {off:.2g} nats on average (noise: {noise:.2g}; {len(sequence.token_ids)} tokens, beside sequences of up to "
                f"{max(len(other.token_ids) for other in sequences)}); set sequences.batch_tokens = 1 (and "
                "generation.batch_tokens = 1 if the teacher writes) so that each sequence runs alone"
            )


def start_copy(distribution: Distribution) -> Callable[[], Distribution]:
    """Begin to copy statistics to the host, in one piece; the result waits for them."""
    if distribution["logsumexp"].device.type == "cpu":
        return lambda: distribution
    packed = pack(distribution)
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(packed.device))

    def arrive() -> Distribution:
        done.synchronize()
        return unpack(host, like=distribution)

    return arrive


def pack(distribution: Distribution) -> Tensor:
    """All bytes of a Distribution in one tensor, columns of four-byte values first, so that all are aligned."""
    columns = [distribution[name] for name in _packing_order(distribution)]
    return torch.cat([column.contiguous().view(torch.uint8).flatten() for column in columns])


def unpack(packed: Tensor, *, like: Distribution) -> Distribution:
    """The inverse of `pack`, as views of its result, in the shapes and types of `like`."""
    columns, start = {}, 0
    for name in _packing_order(like):
        column = like[name]
        end = start + column.numel() * column.itemsize
        columns[name] = packed[start:end].view(column.dtype).view(column.shape)
        start = end
    return columns


def _packing_order(distribution: Distribution) -> list[str]:
    return sorted(distribution, key=lambda name: -distribution[name].itemsize)
