"""Token ids → the tokens with which the teacher goes on: greedily, or drawn with given uniform numbers.

In:   sequences of token ids, of any lengths.
Out:  for each the tokens that follow, up to and with an end-of-sequence token.

How:  `generate` of transformers does the work: cache, attention masks, position ids, stopping. It is told to be greedy, and
      where tokens are to be drawn, a logits processor puts the drawn one above all others. So its own generator of random numbers,
      which a batch shares, has no part in it: a draw inverts the cumulated distribution at a number that belongs to the
      sequence and the position (`draws.uniforms`). Nothing else of the model's generation_config applies but its
      end-of-sequence tokens: penalties or a top_k that a repository sets would bend what a recipe says.

      Sequences are padded on the left, and keys and values are cached. At the start both are compared with what the plain
      forward pass says, and left out for an architecture where they change it.

      Drafts, of which only a part may count, are written without `generate` where the model's layers attend to all that is before
      (`Drafter`): keys and values of what did count are kept, and sequences leave the batch at their ends. Each sequence begins at
      the first place of its cache, which is as long as the sequence will be, so that its attention is summed as in a forward pass.

Shape suffixes: B sequences, T positions, L places of a cache, S steps, V vocabulary, H heads, D width of one.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from builder.capture.draws import invert
from builder.teacher.lengths import ANYWHERE
from builder.teacher.model import PROBE_LENGTHS, PROBE_TOLERANCE, Teacher, to_device
from builder.teacher.precision import UNFIT, error

PROBE_STEPS = 4
PROBE_ROOM = 300
"""Places of the cache with which a Drafter is tried: beyond the windows of layers that do not say that they have one."""
LEAST_QUERIES, OF_MANY = 4, "sdpa_of_many"
PLACES_AT_ONCE = 512
"""A cache is read up to a multiple of this: the number of keys that torch's attention on a CPU sums at a time."""


class Decoder:
    """A teacher that writes."""

    def __init__(
        self, teacher: Teacher, *, temperature: float, top_p: float, ends: Iterable[int] = ()
    ) -> None:
        """Find out how this teacher can be run step by step.

        Args:
            teacher: the teacher.
            temperature: of the distribution that tokens are drawn from; 0 takes the most probable one.
            top_p: draw from the most probable tokens only, as few as have this probability together.
            ends: tokens that end a text beside the teacher's own, such as that of a turn in a chat template.

        Raises:
            ValueError: its steps do not yield what its forward pass does.
        """
        self.teacher = teacher
        self.eos_ids = _eos_ids(teacher) | set(ends)
        self._model = teacher.writer()
        self._model.generation_config = GenerationConfig()
        self._warpers = LogitsProcessorList()
        if temperature not in (0, 1):
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))
        self.padded, self._cached = self._probe()
        may_differ = temperature == 0 and teacher.dtype.itemsize < 4
        self.drafts = may_differ and self._can_draft()
        """Whether there are Drafters: for greedy texts in 16 bits, of which a part may have to be written again."""

    def drafter(self, count: int, *, room: int) -> "Drafter":
        """What writes drafts of what follows some sequences.

        Args:
            count: of the sequences.
            room: tokens that one of them has at most in the end.
        """
        return Drafter(self._model, self.teacher, self.eos_ids, count=count, room=room)

    def decode(
        self, sequences: list[list[int]], *, num_tokens: int, uniforms_BS: Tensor | None = None
    ) -> list[list[int] | None]:
        """At most `num_tokens` tokens that follow each sequence; None where the teacher yields NaN or infinity.

        Args:
            sequences: all of one length, unless `padded`.
            num_tokens: S, steps.
            uniforms_BS: float64 numbers in [0, 1) to draw with; None takes the most probable tokens.
        """
        draw = None
        if uniforms_BS is not None:
            draw = _Draw(to_device(uniforms_BS, self.teacher.device), self._warpers)
        ids_BT = self._generate(
            sequences,
            padded=self.padded,
            cached=self._cached,
            processors=[draw] if draw else [],
            max_new_tokens=num_tokens,
            eos_token_id=list(self.eos_ids) or None,
            pad_token_id=min(self.eos_ids, default=None),
        ).sequences
        length = max(map(len, sequences))
        written = [self._until_eos(ids) for ids in ids_BT[:, length:].tolist()]
        bad = draw.bad_B1.flatten().tolist() if draw else [False] * len(written)
        return [None if is_bad else ids for ids, is_bad in zip(written, bad, strict=True)]

    def _until_eos(self, ids: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(ids) if token in self.eos_ids), len(ids))
        return ids[:end]

    @torch.inference_mode()
    def _generate(
        self,
        sequences: list[list[int]],
        *,
        padded: bool,
        cached: bool,
        processors: list[LogitsProcessor],
        **options: Any,
    ) -> Any:
        length = max(map(len, sequences))
        ids_BT = torch.full((len(sequences), length), options.get("pad_token_id") or 0)
        mask_BT = torch.zeros_like(ids_BT)
        for ids_T, mask_T, ids in zip(ids_BT, mask_BT, sequences, strict=True):
            ids_T[length - len(ids) :] = torch.tensor(ids)
            mask_T[length - len(ids) :] = 1
        config = GenerationConfig(
            do_sample=False, use_cache=cached, return_dict_in_generate=True, **options
        )
        self.teacher.forget()
        masks = {"attention_mask": to_device(mask_BT, self.teacher.device)} if padded else {}
        return self._model.generate(
            to_device(ids_BT, self.teacher.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            **masks,
        )

    def _probe(self) -> tuple[bool, bool]:
        """The fastest way that is right: (whether sequences may be padded, whether keys and values may be cached)."""
        vocab = self.teacher.model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(vocab, (PROBE_LENGTHS[0],), generator=generator).tolist()
        prompts = [text[:length] for length in PROBE_LENGTHS]
        for padded, cached in ((True, True), (False, True), (False, False)):
            try:
                batches = [prompts] if padded else [[prompt] for prompt in prompts]
                errors = [self._error(batch, padded=padded, cached=cached) for batch in batches]
            except torch.OutOfMemoryError:
                raise  # what a teacher can do does not depend on the memory that is free
            except (*UNFIT, ValueError):
                continue  # an architecture that takes no mask, or has no cache
            if max(errors) <= PROBE_TOLERANCE[self.teacher.dtype]:
                return padded, cached
        raise ValueError(
            f"{type(self.teacher.model).__name__} cannot generate: its outputs step by step differ from those of one forward pass; use another teacher"
            ", or leave out [generation]"
        )

    def _can_draft(self) -> bool:
        """Whether a Drafter goes on as the forward pass does, from the beginning and after a part of a draft was given up."""
        if self.teacher.reach != ANYWHERE or not self._cached:
            return False
        vocab = self.teacher.model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(1)
        texts = torch.randint(vocab, (len(PROBE_LENGTHS), PROBE_LENGTHS[0]), generator=generator)
        try:
            layers = DynamicCache(config=self.teacher.model.config).layers
            if not layers or {type(layer) for layer in layers} != {DynamicLayer}:
                return False
            drafter = self.drafter(len(texts), room=PROBE_ROOM)
            errors = []
            for end in (0, 1):
                prompts = [
                    ids[: n - end] for ids, n in zip(texts.tolist(), PROBE_LENGTHS, strict=True)
                ]
                logits_BV = drafter.logits(prompts)
                expected_BV = torch.stack(
                    [torch.cat(list(self.teacher.logits([ids])))[-1] for ids in prompts]
                )
                errors.append(error(logits_BV, expected_BV.float()))
        except torch.OutOfMemoryError:
            raise  # as in `_probe`
        except (*UNFIT, ValueError):
            return False
        return max(errors) <= PROBE_TOLERANCE[self.teacher.dtype]

    def _error(self, prompts: list[list[int]], *, padded: bool, cached: bool) -> float:
        """Largest mean |Δ logit| of a prompt's steps from the forward pass, in standard deviations of its logits."""
        found = self._generate(
            prompts,
            padded=padded,
            cached=cached,
            processors=[],
            max_new_tokens=PROBE_STEPS,
            output_logits=True,
        )
        worst = 0.0
        for row, prompt in enumerate(prompts):
            ids = [*prompt, *found.sequences[row, -PROBE_STEPS:].tolist()]
            expected_SV = torch.cat(list(self.teacher.logits([ids])))[-PROBE_STEPS - 1 : -1].float()
            found_SV = torch.stack([logits_BV[row] for logits_BV in found.logits]).float()
            worst = max(worst, error(found_SV, expected_SV))
        return worst


class Drafter:
    """Writes the most probable tokens after sequences that change and grow, and runs no token again that is still in its place."""

    def __init__(
        self, model: Any, teacher: Teacher, eos_ids: frozenset[int], *, count: int, room: int
    ) -> None:
        """Prepare to write.

        Args:
            model: the teacher's, as it writes.
            teacher: the teacher.
            eos_ids: tokens behind which nothing is written.
            count: of the sequences.
            room: tokens that one of them has at most in the end.
        """
        self._model, self._teacher, self._eos_ids = model, teacher, eos_ids
        self._places = _Places(count, room)
        self._cache = Cache(layer_class_to_replicate=lambda: _Layer(self._places))  # type: ignore[arg-type]  # anything that makes one
        self._attention = _Attention(model) if teacher.device.type == "cpu" else nullcontext()
        self._rows = list(range(count))
        """Which sequence is in which row of the cache."""
        self._cached: list[list[int]] = [[] for _ in range(count)]
        """The tokens whose keys and values are there, of each sequence."""

    def extend(self, sequences: list[list[int]], counts: list[int]) -> list[list[int]]:
        """So many tokens at most that follow each sequence, none behind one that ends a text.

        Args:
            sequences: always the same ones, of which the ends may have changed.
            counts: 0 for a sequence that is only kept in mind.
        """
        drafts: list[list[int]] = [[] for _ in sequences]
        while active := [i for i, count in enumerate(counts) if self._goes_on(drafts[i], count)]:
            logits_BV = self.logits([[*sequences[i], *drafts[i]] for i in active], active)
            for i, token in zip(active, logits_BV.argmax(-1).tolist(), strict=True):
                drafts[i].append(token)
        return drafts

    def _goes_on(self, draft: list[int], count: int) -> bool:
        return len(draft) < count and (not draft or draft[-1] not in self._eos_ids)

    @torch.inference_mode()
    def logits(self, sequences: list[list[int]], numbers: list[int] | None = None) -> Tensor:
        """[B, V] logits of what follows each sequence.

        Args:
            sequences: not empty.
            numbers: which ones they are; None for all.
        """
        numbers = list(range(len(sequences))) if numbers is None else numbers
        self._bring_together(numbers)
        rows = {number: row for row, number in enumerate(self._rows)}
        order = sorted(range(len(numbers)), key=lambda i: rows[numbers[i]])
        ids = [sequences[i] for i in order]
        known = [_common(self._cached[numbers[i]], sequences[i][:-1]) for i in order]
        before = [row[start:-1] for row, start in zip(ids, known, strict=True)]
        if any(before):
            self._run(before, known)
        logits_BV = self._run([row[-1:] for row in ids], [len(row) - 1 for row in ids])
        for i in order:
            self._cached[numbers[i]] = list(sequences[i])
        back = sorted(range(len(order)), key=lambda row: order[row])
        return logits_BV if back == list(range(len(back))) else logits_BV[back]

    def _run(self, ids: list[list[int]], starts: list[int]) -> Tensor:
        """[B, V] logits at the last of the tokens that stand at some places. Where a row has fewer, no token follows on what is run for it."""
        length = max(map(len, ids))
        ids_BT = torch.zeros(len(ids), length, dtype=torch.long)
        for ids_T, row in zip(ids_BT, ids, strict=True):
            ids_T[: len(row)] = torch.tensor(row, dtype=torch.long)
        device = self._teacher.device
        # What is beyond a row's own tokens is written again before it is seen; the last place is that of a token that nothing follows.
        places_BT = torch.tensor(starts)[:, None] + torch.arange(length)
        places_BT = to_device(places_BT.clamp(max=self._places.room - 1), device)
        end = self._places.set(places_BT, max(starts) + length)
        mask_B1TL = (torch.arange(end, device=device) <= places_BT[..., None])[:, None]
        with self._attention:
            logits_B1V = self._model(
                input_ids=to_device(ids_BT, device),
                position_ids=places_BT,
                attention_mask=mask_B1TL,
                cache=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        logits_BV: Tensor = logits_B1V[:, -1]
        return logits_BV

    def _bring_together(self, numbers: list[int]) -> None:
        """Have some sequences in the first rows."""
        wanted = set(numbers)
        gaps = [row for row in range(len(numbers)) if self._rows[row] not in wanted]
        beyond = [row for row in range(len(numbers), len(self._rows)) if self._rows[row] in wanted]
        for one, other in zip(gaps, beyond, strict=True):
            self._rows[one], self._rows[other] = self._rows[other], self._rows[one]
            for layer in self._cache.layers:
                assert isinstance(layer, _Layer)
                layer.swap(one, other)


class _Places:
    """Where in the cache the tokens stand that are being run: what all layers are told."""

    def __init__(self, count: int, room: int) -> None:
        self.count, self.room = count, room

    def set(self, places_BT: Tensor, end: int) -> int:
        """The places of the next tokens, all before `end`; returns how many are read."""
        self.places_BT = places_BT
        self.rows_B1 = torch.arange(len(places_BT), device=places_BT.device)[:, None]
        self.end = min(self.room, -(-end // PLACES_AT_ONCE) * PLACES_AT_ONCE)
        return self.end


class _Layer(DynamicLayer):
    """Keys and values of a layer, each at its token's place."""

    keys: Any
    values: Any

    def __init__(self, places: _Places) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._now = places

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take those of some tokens in; those of the same sequences, up to where they are read."""
        now = self._now
        if not self.is_initialized:
            self.keys, self.values = (
                new.new_zeros(now.count, new.shape[1], now.room, new.shape[3])
                for new in (key_states, value_states)
            )
            self.is_initialized = True
        found = []
        for held, new_BHTD in ((self.keys, key_states), (self.values, value_states)):
            rows_B1, places_BT = now.rows_B1.to(held.device), now.places_BT.to(held.device)
            held[rows_B1, :, places_BT] = new_BHTD.transpose(1, 2)
            found.append(held[: len(rows_B1), :, : now.end])
        return found[0], found[1]

    def swap(self, one: int, other: int) -> None:
        """Two rows, each in the place of the other."""
        for held in (self.keys, self.values):
            held[[one, other]] = held[[other, one]]


class _Attention:
    """While it is entered, a model's attention of a few queries is summed as that of many, so that no last bit differs.

    For fewer than LEAST_QUERIES, torch on a CPU takes a product that sums in another order. Where 16-bit products do not depend on the
    number of rows either, a draft's keys and values are those of the forward pass, bit for bit.
    """

    def __init__(self, model: Any) -> None:
        AttentionInterface.register(OF_MANY, _of_many)
        found = (getattr(module, "config", None) for module in model.modules())
        configs = {id(config): config for config in found if config is not None}.values()
        self._configs = [c for c in configs if getattr(c, "_attn_implementation", None) == "sdpa"]

    def __enter__(self) -> None:
        for config in self._configs:
            config._attn_implementation = OF_MANY

    def __exit__(self, *_: object) -> None:
        for config in self._configs:
            config._attn_implementation = "sdpa"


def _of_many(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """`sdpa_attention_forward`, in which the one query of each head stands several times."""
    batch, heads, count, width = query.shape
    groups = heads // key.shape[1]
    if (
        count > 1
        or groups >= LEAST_QUERIES
        or attention_mask is None
        or attention_mask.shape[1] > 1
    ):
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found, None
    # The heads that share keys are queries of one, as transformers itself has it.
    packed = query.reshape(batch, -1, groups, width).repeat(1, 1, -(-LEAST_QUERIES // groups), 1)
    found, _ = sdpa_attention_forward(nn.Module(), packed, key, value, attention_mask, **options)
    return found[:, :groups].transpose(1, 2).reshape(batch, 1, heads, -1), None


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with that are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class _Draw(LogitsProcessor):
    """Puts the token at which a uniform number points above all others, step by step."""

    def __init__(self, uniforms_BS: Tensor, warpers: LogitsProcessorList) -> None:
        self._steps = iter(uniforms_BS.split(1, dim=1))
        self._warpers = warpers
        self.bad_B1 = torch.zeros_like(uniforms_BS[:, :1], dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        warped_BV: Any = self._warpers(input_ids, scores)  # type: ignore[arg-type]  # as `generate` calls it
        probs_BV = warped_BV.softmax(-1)
        self.bad_B1 |= probs_BV.sum(-1, keepdim=True).isnan()
        token_B1, _ = invert(probs_BV, next(self._steps))
        return scores.scatter(1, token_B1, torch.inf)


def _eos_ids(teacher: Teacher) -> frozenset[int]:
    """The tokens that end a text: those of the model's generation_config (a chat model has several), and the tokenizer's."""
    own = teacher.model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return frozenset(
        int(token) for token in (*listed, teacher.tokenizer.eos_token_id) if token is not None
    )
