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

Shape suffixes: B sequences, T positions, S steps, V vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from builder.capture.draws import invert
from builder.teacher.model import PROBE_LENGTHS, PROBE_TOLERANCE, Teacher, to_device

PROBE_STEPS = 4


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
            except (AttributeError, TypeError, RuntimeError, IndexError, ValueError):
                continue  # an architecture that takes no mask, or has no cache
            if max(errors) <= PROBE_TOLERANCE[self.teacher.dtype]:
                return padded, cached
        raise ValueError(
            f"{type(self.teacher.model).__name__} cannot write: what it yields step by step is not what its forward pass yields; "
            "use another teacher, or leave out [generation]"
        )

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
            finite = expected_SV.isfinite()
            error = (found_SV - expected_SV)[finite].abs().mean()
            worst = max(worst, float(error / expected_SV[finite].std().clamp(min=1e-6)))
        return worst


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
