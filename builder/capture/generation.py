"""Prompts → rows: the teacher writes completions, and the capture pass scores prompt and completion like any other text.

In:   a window of encoded prompts, a teacher that writes (`decoding`) and the pipeline that captures.
Out:  one Block: the rows of these prompts, in their order.

How:  what is stored comes from the capture pass alone, and so is the true distribution at temperature 1, whatever the sampler did.

      Drawn completions are written to their end and captured once. A greedy completion is more delicate: each of its tokens
      is to be the first of the stored top K at its position, but in 16 bits, writing (one token at a time, with a cache)
      and capturing (all positions at once) round differently, and about one token in a hundred falls the other way. So a greedy
      completion is only a draft, and the capture pass decides, as in speculative decoding (Leviathan et al. 2023): positions
      count up to the first at which the draft is not the captured choice; that choice takes its place, and the
      teacher goes on writing from there. What was captured stays as it is, for later tokens do not change it. So each round
      adds at least a token, and the stored numbers agree with the tokens by construction.

      A window is a pure function of its prompts; no random number depends on what shares a batch with it.

      Drafts are long or short by the share of tokens that were corrected so far in the window (`_longest_draft`), and what counts of one
      is not run again for the next (`decoding.Drafter`). For teachers that have no Drafter, `generate` writes each draft anew.

Cost: of drawn completions, writing and one capture. Of greedy ones in 16 bits the same, and for every draft that goes wrong its rest and
      one more capture of the row. On a processor on which a Drafter and the forward pass agree to the bit, none does.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from builder.capture.decoding import Decoder
from builder.capture.distribution import Distribution, concatenate
from builder.capture.draws import uniforms
from builder.capture.pipeline import WINDOW_BATCHES, WINDOW_VALUES, Notice, Pipeline, Progress
from builder.corpus.sequences import NO_TOKEN, Sequence, length_sorted_batches
from builder.dataset.shards import Block
from logit_dataset.schema import Layout

FIRST_DRAFT_TOKENS = 64
"""Of greedy completions in 16 bits, where about one token of a hundred is not the captured choice (embedded teacher, bfloat16: 8 of 1,152)."""
SHORTEST_DRAFT_TOKENS = 16
PRIOR_CORRECTED, PRIOR_TOKENS = 1, 1024
"""Corrections, and the tokens with which they came, that a window counts from the start."""
CAPTURE_SHARE = defaultdict(lambda: 0.01, cpu=0.2)
"""What it costs to capture a position, in tokens written in a batch (embedded teacher, CPU: 0.9 of 4 ms). On a GPU, where a step takes as long
as thousands of positions, this is an estimate."""


@dataclass(slots=True, kw_only=True)
class _Row:
    """A completion that is being written."""

    prompt: Sequence
    sample: int
    token_ids: list[int]
    """Of the prompt, and of the completion as far as it is settled."""
    draft: list[int] = field(default_factory=list)
    """What may follow these."""
    captured: list[Distribution] = field(default_factory=list)
    """The distributions of the first positions."""
    num_captured: int = 0
    corrected: int = 0
    """Tokens of drafts that were not the captured choice."""

    @property
    def num_written(self) -> int:
        """Settled tokens of the completion."""
        return len(self.token_ids) - len(self.prompt.token_ids)


class Generator:
    """Turns the prompts of one shard into rows."""

    def __init__(
        self,
        decoder: Decoder,
        pipeline: Pipeline,
        *,
        layout: Layout,
        is_greedy: bool,
        max_new_tokens: int,
        samples: int,
        seed: int,
        batch_tokens: int,
        progress: Progress = lambda _: None,
        notice: Notice = lambda _: None,
    ) -> None:
        """Prepare to run.

        Args:
            decoder: the teacher that writes.
            pipeline: the capture pass.
            layout: what is to be stored.
            is_greedy: whether tokens are the most probable ones rather than drawn.
            max_new_tokens: where a completion ends at the latest.
            samples: completions of each prompt.
            seed: of the draws.
            batch_tokens: positions of the sequences that are written at the same time, padding included.
            progress: told of tokens as they are written; of a negative number where a draft is given up.
            notice: told of batches that did not fit the device's memory.
        """
        self._decoder = decoder
        self._pipeline = pipeline
        self._is_greedy = is_greedy
        self._max_new_tokens = max_new_tokens
        self.samples = samples
        self._seed = seed
        self._completions_only = layout.completions_only
        self._batch_tokens = batch_tokens
        self._progress = progress
        self._notice = notice
        self.window_tokens = min(WINDOW_BATCHES * batch_tokens, WINDOW_VALUES // layout.widest)
        """Positions that the rows of a window may have at most, unless it is a single prompt."""
        self.counts: Counter[str] = Counter()
        """Of the rows that were handed out: what `manifest.Completions` is made of."""
        self._halved_batches = 0

    @property
    def halved_batches(self) -> int:
        """How many batches did not fit the device's memory and were halved: this can change last bits."""
        return self._halved_batches + self._pipeline.halved_batches

    def room(self, prompt: Sequence) -> int:
        """Positions that the rows of a prompt have at most."""
        return self.samples * (len(prompt.token_ids) + self._max_new_tokens)

    def complete(
        self, prompts: list[Sequence], *, max_tokens: int | None = None
    ) -> tuple[Block, int]:
        """The rows of a window of prompts, and how many of the prompts they are of.

        Args:
            prompts: together of no more than `window_tokens`, each with room for a completion within the teacher's reach.
            max_tokens: leave out what follows the prompt whose rows reach this number of tokens.

        Raises:
            ValueError: the teacher yields NaN or infinity (names the document), or one sequence alone does not fit
                the device's memory.
        """
        rows = [
            _Row(prompt=prompt, sample=sample, token_ids=list(prompt.token_ids))
            for prompt in prompts
            for sample in range(self.samples)
        ]
        self._progress(sum(len(row.token_ids) for row in rows))
        if self._decoder.drafts:
            self._draft(rows)
            return self._block(rows, max_tokens)
        is_drafted = self._is_greedy and self._decoder.teacher.dtype.itemsize < 4
        draft_tokens = FIRST_DRAFT_TOKENS if is_drafted else self._max_new_tokens
        waiting = rows
        while waiting:
            before = sum(row.num_written for row in waiting)
            self._write(waiting, draft_tokens)
            self._capture(waiting)
            settled = sum(row.num_written for row in waiting) - before
            draft_tokens = max(2 * settled // len(waiting), SHORTEST_DRAFT_TOKENS)
            waiting = [row for row in waiting if row.num_captured < len(row.token_ids)]
        return self._block(rows, max_tokens)

    def _draft(self, rows: list[_Row]) -> None:
        """Write and capture rows whose keys and values are kept from draft to draft, a batch after the other."""
        self._each_batch(rows, self._max_new_tokens, lambda batch: self._draft_batch(batch, rows))

    def _draft_batch(self, batch: list[_Row], rows: list[_Row]) -> None:
        room = max(len(row.prompt.token_ids) for row in batch) + self._max_new_tokens
        drafter = self._decoder.drafter(len(batch), room=room)
        while waiting := [row for row in batch if row.num_captured < len(row.token_ids)]:
            longest = self._longest_draft(rows, room)
            counts = [
                0
                if self._is_finished(row, row.token_ids)
                else min(longest, self._max_new_tokens - row.num_written)
                for row in batch
            ]
            drafts = drafter.extend([row.token_ids for row in batch], counts)
            for row, draft in zip(batch, drafts, strict=True):
                row.draft = draft
                self._progress(len(draft))
            self._capture(waiting)

    def _longest_draft(self, rows: list[_Row], room: int) -> int:
        """Where what is captured once more, and what is written in vain, cost the same, by the corrections so far."""
        corrected = PRIOR_CORRECTED + sum(row.corrected for row in rows)
        settled = PRIOR_TOKENS + sum(row.num_written for row in rows)
        share = CAPTURE_SHARE[self._decoder.teacher.device.type]
        best: float = (2 * room * share * settled / corrected) ** 0.5
        return max(SHORTEST_DRAFT_TOKENS, round(best))

    def _write(self, rows: list[_Row], draft_tokens: int) -> None:
        """Give every row that has not ended a draft of what follows."""
        for row in rows:
            row.draft = []
        unfinished = [row for row in rows if not self._is_finished(row, row.token_ids)]
        self._each_batch(
            unfinished, draft_tokens, lambda batch: self._write_batch(batch, draft_tokens)
        )

    def _each_batch(
        self, rows: list[_Row], draft_tokens: int, run: Callable[[list[_Row]], None]
    ) -> None:
        """Run batches of the rows; a batch that does not fit the device's memory in halves. What is settled stays so."""
        waiting = deque(self._batches(rows, draft_tokens))
        while waiting:
            batch = waiting.popleft()
            try:
                run(batch)
                continue
            except torch.OutOfMemoryError:
                pass  # what the failed attempt holds is let go with the exception, before the next attempt
            waiting.extendleft(reversed(self._halves(batch, draft_tokens)))

    def _write_batch(self, rows: list[_Row], draft_tokens: int) -> None:
        steps = min(draft_tokens, max(self._max_new_tokens - row.num_written for row in rows))
        # Those that are at their end go on until all are, but not beyond where they would change what the others get.
        longest = max(len(row.token_ids) for row in rows)
        steps = min(steps, self._decoder.teacher.reach(longest) - longest)
        uniforms_BS = None
        if not self._is_greedy:
            uniforms_BS = torch.stack([self._uniforms(row, steps) for row in rows])
        drafts = self._decoder.decode(
            [row.token_ids for row in rows], num_tokens=steps, uniforms_BS=uniforms_BS
        )
        for row, draft in zip(rows, drafts, strict=True):
            if draft is None:
                raise ValueError(
                    f"the teacher yields NaN or infinity while it completes document {row.prompt.document_id!r}; try another teacher.dtype, or remove the document"
                )
            row.draft = draft[: self._max_new_tokens - row.num_written]
            self._progress(len(row.draft))

    def _uniforms(self, row: _Row, steps: int) -> Tensor:
        # Below 0 are no chunks, whose draws from the tail have the numbers from 0 on. What is drawn is written at once.
        document_id = row.prompt.document_id
        numbers_S1 = uniforms(
            self._seed, document_id, -1 - row.sample, num_positions=steps, count=1
        )
        return numbers_S1[:, 0]

    def _batches(self, rows: list[_Row], draft_tokens: int) -> Iterator[list[_Row]]:
        """Rows of like length, longest first; of the same length, where the teacher bears no padding."""
        reach = self._decoder.teacher.reach
        lengths = [len(row.token_ids) + draft_tokens for row in rows]
        groups = [list(range(len(rows)))]
        if not self._decoder.padded:
            groups = [
                [i for i in range(len(rows)) if lengths[i] == length]
                for length in sorted(set(lengths), reverse=True)
            ]
        for group in groups:
            for batch in length_sorted_batches(
                [lengths[i] for i in group],
                self._batch_tokens,
                # What a row has is within its reach, and so is all that it may become; a draft may be longer.
                lambda length: reach(length - draft_tokens),
            ):
                yield [rows[group[i]] for i in batch]

    def _halves(self, rows: list[_Row], draft_tokens: int) -> list[list[_Row]]:
        device = self._decoder.teacher.device
        longest = max(len(row.token_ids) for row in rows) + draft_tokens
        if len(rows) == 1:
            raise ValueError(
                f"writing a single sequence of {longest} tokens does not fit in the memory of {device}; choose a smaller "
                "generation.max_new_tokens or sequences.max_length, or a device with more memory"
            )
        self._halved_batches += 1
        self._notice(
            f"out of memory on {device} while writing {len(rows)} completions of up to {longest} tokens: continuing with half as "
            "many; a smaller generation.batch_tokens avoids this"
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(rows) // 2
        return [rows[:middle], rows[middle:]]

    def _capture(self, rows: list[_Row]) -> None:
        """Score every row with its draft, and settle what of that counts."""
        waiting = iter(rows)
        sequences = [
            Sequence(
                document_id=self._row_id(row),
                chunk_index=0,
                text="",
                token_ids=[*row.token_ids, *row.draft],
                next_token=NO_TOKEN,
                completion_mask=_mask(row, row.num_written + len(row.draft)),
            )
            for row in rows
        ]
        for block in self._pipeline.blocks(iter(sequences)):
            start = start_kept = 0
            for sequence in block.sequences:
                here = slice(start, start + len(sequence.token_ids))
                kept = here
                if self._completions_only:
                    kept = slice(start_kept, start_kept + len(sequence.loss_positions))
                found = {
                    name: column[here if column.ndim == 1 else kept]
                    for name, column in block.distribution.items()
                }
                self._settle(next(waiting), sequence.token_ids, found)
                start, start_kept = here.stop, kept.stop

    def _settle(self, row: _Row, ids: list[int], found: Distribution) -> None:
        """Keep what was captured, up to the first token of a greedy draft that is not the captured choice.

        The last position of a row that goes on is left for the next capture, which knows what follows it.
        """
        count, correction = len(ids) - (not self._is_finished(row, ids)), None
        # The first position that columns of several values a token hold.
        first = len(row.prompt.token_ids) - 1 if self._completions_only else 0
        if self._is_greedy:
            choices = _choices(found, ids[first + 1 :])
            for position in range(len(row.token_ids) - 1, len(ids) - 1):
                if choices[position - first] != ids[position + 1]:
                    count, correction = position + 1, choices[position - first]
                    row.corrected += 1
                    break
        kept = {}
        for name, column in found.items():
            start = first if column.ndim > 1 else 0
            here = slice(max(row.num_captured - start, 0), count - start)
            kept[name] = column[here].clone()
        row.token_ids = ids
        if correction is not None:
            head = kept.get("topk_logprobs", kept.get("logprobs"))
            assert head is not None
            kept["target_logprob"][-1] = head[-1].max()
            row.token_ids = [*ids[:count], correction]
        self._progress(len(row.token_ids) - len(ids))
        row.captured.append(kept)
        row.num_captured = count

    def _is_finished(self, row: _Row, ids: list[int]) -> bool:
        written = len(ids) - len(row.prompt.token_ids)
        return written == self._max_new_tokens or (written > 0 and ids[-1] in self._decoder.eos_ids)

    def _block(self, rows: list[_Row], max_tokens: int | None) -> tuple[Block, int]:
        """The rows as they are stored, up to the prompt that reaches `max_tokens`."""
        tokens = num_prompts = 0
        kept: list[_Row] = []
        while len(kept) < len(rows) and (max_tokens is None or tokens < max_tokens):
            of_prompt = rows[len(kept) : len(kept) + self.samples]
            tokens += sum(len(row.token_ids) for row in of_prompt)
            num_prompts += 1
            kept += of_prompt
        self.counts.update(
            prompts=num_prompts,
            completions=len(kept),
            tokens=sum(row.num_written for row in kept),
            ended=sum(row.token_ids[-1] in self._decoder.eos_ids for row in kept),
            corrected=sum(row.corrected for row in kept),
        )
        block = Block(
            sequences=[self._sequence(row) for row in kept],
            distribution=concatenate([part for row in kept for part in row.captured]),
        )
        return block, num_prompts

    def _row_id(self, row: _Row) -> str:
        document_id = row.prompt.document_id
        return f"{document_id}/{row.sample}" if self.samples > 1 else document_id

    def _sequence(self, row: _Row) -> Sequence:
        num_prompt = len(row.prompt.token_ids)
        written = spell_completion(self._decoder.teacher.tokenizer, row.token_ids, num_prompt)
        return Sequence(
            document_id=self._row_id(row),
            chunk_index=0,
            text=row.prompt.text + written,
            token_ids=row.token_ids,
            next_token=NO_TOKEN,
            completion_mask=_mask(row, row.num_written),
            notes=() if row.sample else row.prompt.notes,
        )


def _mask(row: _Row, num_written: int) -> list[bool]:
    return [False] * len(row.prompt.token_ids) + [True] * num_written


def _choices(found: Distribution, following: list[int]) -> list[int]:
    """The captured choice at each position that has a token that follows: the first of the top K."""
    if "topk_indices" in found:
        choices: list[int] = found["topk_indices"][: len(following), 0].tolist()
        return choices
    # Where all are stored, in float16, several may be the first: then the one that follows, if it is among these.
    logprobs_TV = found["logprobs"][: len(following)]
    best_T, choices_T = logprobs_TV.max(-1)
    following_T = torch.tensor(following)
    is_first_T = logprobs_TV.gather(1, following_T[:, None])[:, 0] == best_T
    tied: list[int] = torch.where(is_first_T, following_T, choices_T).tolist()
    return tied


def spell_completion(tokenizer: Any, ids: list[int], start: int) -> str:
    """The text of the tokens from `start` on, special tokens included, as it stands behind those before."""
    before, whole = (
        tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (ids[:start], ids)
    )
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False))
