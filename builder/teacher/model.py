"""Token ids → the raw logits at every real position, from a frozen language model.

In:   sequences of token ids, unpadded, of any lengths.
Out:  pieces of [n, V] raw logits, in order: all positions of the first sequence, then of the second, and so on.

How:  sequences are padded on the right; under causal attention no real position can see the padding, so no mask is
      needed and nothing leaks. The body of the model runs once over [B, T]; the head runs over real positions only,
      in pieces of a fixed size, so memory does not grow with B · T · V.

      Some architectures do more than a matrix product after the body (soft-capping, logit scales, an `embed_out`).
      Instead of a table of them, the head here is the model's own forward method with the body replaced by one that
      hands over given hidden states (see `head`). At load both are compared with the whole model, one sequence at a time; where
      they differ, the whole model is used instead, and where even that is not causal, the teacher is refused.

      The last product of a 16-bit model is summed in float32, and its logits are kept as they are before they are rounded (see
      `precision`). On a CPU a second product costs too much, so that a build gets rounded logits, and the means to have those in
      float32 that matter (`rounded`).

      Some architectures choose numbers by the length of a batch. `reach` says which lengths may share one (see `lengths`).

      A model can be spread over several GPUs (accelerate moves what passes between them) or split over several processes
      (see `ranks`). Then logits may come from another device than the one that takes the ids.

Shape suffixes: B sequences, T positions, N real positions, V vocabulary, D hidden.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from builder.checkpoint.quantisation import count_parameters
from builder.teacher.head import body_of, head_of
from builder.teacher.lengths import forgetting, max_length_of, reach_of
from builder.teacher.own import OwnModel
from builder.teacher.precision import (
    Exact,
    Picker,
    Rounded,
    error,
    find,
    find_picker,
    is_float32,
    with_product,
)
from builder.tokenizer.tokenizer import origin_of

CPU_LOGITS_BYTES, CUDA_LOGITS_BYTES = 30 * 2**20, 256 * 2**20
"""Logits that exist at once, however large V is: enough rows for a matrix product at full speed, few enough to fit anywhere. On a CPU, just
below 32 MB, from which on Linux clears new memory for every piece (25 of 92 µs a row of the embedded teacher in bfloat16)."""

PROBE_LENGTHS = (24, 13, 5)
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest mean |Δ logit| between two ways to compute the same, in standard deviations of the logits: rounding noise
stays ten times below, while a missing scale, a leak or a shift exceeds it."""


Together = Callable[[str, Any], AbstractContextManager[None]]
"""Around a forward pass of this process: `follow` is called with the same arguments in the other ones."""


HeadDtype = Literal["float32", "teacher"]


class Teacher:
    """A frozen causal language model with its tokenizer, ready to run."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: torch.device,
        together: Together | None = None,
        quantisation: dict[str, Any] | None = None,
        head_dtype: HeadDtype = "float32",
        is_cut: bool = False,
    ) -> None:
        """Wrap a loaded model, and find out which way to its logits is right.

        Args:
            model: with all of its weights on `device`, or spread over several, of which it is the first.
            tokenizer: the model's own.
            device: where it takes token ids.
            together: for a model that is split over processes, all of which make their Teacher at the same time; None for
                one that is not.
            quantisation: how its weights are packed, as plain JSON values; None if they are plain numbers.
            head_dtype: "float32" has the logits of a model in 16 bits before they are rounded, wherever that can be had.
            is_cut: whether the weights of some parts, through which no text passes, were given back.

        Raises:
            ValueError: the model is not causal, its logits hold NaN, or the tokenizer does not fit it.
        """
        self.model = model.eval().requires_grad_(False)
        if not is_spread(model):
            self.model = self.model.to(device)
        self.tokenizer = tokenizer
        self.origin = origin_of(tokenizer)
        """Where the tokenizer comes from; None for one that was made in memory."""
        self.device = device
        self.dtype: torch.dtype = model.dtype
        self.quantisation = quantisation
        self._is_cut = is_cut
        _check_tokenizer(model, tokenizer)
        self.reach = reach_of(self.model)
        """How long a batch may be for a sequence in it. Those with the same reach may share one."""
        self.forget = forgetting(self.model)
        """Makes the model the one that it was before it ran, so that no sequence depends on earlier ones."""
        self._is_split = together is not None
        self._together: Together = lambda *_: nullcontext()
        self._hidden_ND: Tensor | None = None
        """What `hidden` returned last, of a model that is split: the other processes have it, too."""
        self.logits_device = device
        """Where logits come from."""
        self._exact: Exact | None = None
        """How its logits are had in float32, where its own code rounds them."""
        self._picker: Picker | None = None
        self._view: Any = self.model
        """The model that runs as a whole."""
        self.head_dtype: str | None = None
        """What its logits are in, where that is not the dtype of the rest."""
        self._rounds = False
        """Whether float32 was asked for and cannot be had."""
        self.vocab_size, self.head_only = self._probe()
        if head_dtype == "float32" and self.dtype.itemsize < 4:
            self._use_float32()
        self.hidden_size = self.hidden([[0]]).shape[1] if self.head_only else None
        """Of what the head takes, which need not be what the body's layers work on; None where it cannot run alone."""
        if together is not None:
            self._together = together

    @property
    def max_length(self) -> int | None:
        """Longest sequence that the model was made for, where its configuration says so."""
        return max_length_of(self.model.config)

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of the loaded teacher, a line each."""
        rounds = (
            f"the head of {type(self.model).__name__} does not run in float32 here: its logits are rounded to {_name(self.dtype)}, and so are "
            "the log-probabilities",
        )
        return (*(self.origin.notices if self.origin else ()), *(rounds if self._rounds else ()))

    def provenance(self) -> dict[str, Any]:
        """What the loaded teacher is, beyond where it came from: plain JSON values."""
        tokenizer_json = self.tokenizer.backend_tokenizer.to_str()
        return {
            "architecture": type(self.model).__name__,
            "parameters": self._num_parameters(),
            **(
                {"state_sha256": self.model.state_sha256}
                if isinstance(self.model, OwnModel)
                else {}
            ),
            **({"quantisation": self.quantisation} if self.quantisation else {}),
            "dtype": _name(self.dtype),
            **({"head_dtype": self.head_dtype} if self.head_dtype else {}),
            "attention": self.model.config._attn_implementation,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "tokenizer_vocab_size": len(self.tokenizer),
            "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
            "eos_token_id": self.tokenizer.eos_token_id,
            **(self.origin.provenance if self.origin else {}),
        }

    def _num_parameters(self) -> int:
        if self.quantisation or self._is_cut:
            return count_parameters(self.model)
        return sum(parameter.numel() for parameter in self.model.parameters())

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Compute raw logits at every position of every sequence, in order, in pieces of [n, V] on the device.

        Args:
            sequences: of the same reach.
        """
        if not self.head_only:
            for ids in sequences:
                with self._together("whole", list(ids)):
                    logits_TV = self._whole(to_device(torch.tensor([list(ids)]), self.device))[0]
                yield from logits_TV.split(self._rows_per_piece(self.logits_bytes))
            return
        yield from self.head(self.hidden(sequences))

    @torch.inference_mode()
    def head(self, hidden_ND: Tensor) -> Iterator[Tensor]:
        """Raw logits of given last hidden states, in pieces of [n, V]; only where `head_only`."""
        are_known = hidden_ND is self._hidden_ND  # to other processes, too
        step = self._rows_per_piece(self.logits_bytes)
        for start in range(0, len(hidden_ND), step):
            rows = slice(start, start + step)
            with self._together("head", rows if are_known else hidden_ND[rows].cpu()):
                logits_NV = self._apply_head(hidden_ND[rows])
            yield logits_NV

    @torch.inference_mode()
    def rounded(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor | Rounded]:
        """As `logits`, but where float32 costs much, rounded ones with the way to others: enough for a top K and draws."""
        if self._picker is None:
            yield from self.logits(sequences)
        else:
            yield from self.rounded_head(self.hidden(sequences))

    @torch.inference_mode()
    def rounded_head(self, hidden_ND: Tensor) -> Iterator[Tensor | Rounded]:
        """The same of given last hidden states; only where `head_only`."""
        if self._picker is None:
            yield from self.head(hidden_ND)
            return
        for piece_ND in hidden_ND.split(self._rows_per_piece(self.dtype.itemsize)):
            yield Rounded(
                logits_NV=_apply(self._rounded_head, piece_ND),
                hidden_ND=piece_ND,
                picker=self._picker,
                all_of=self._apply_head,
            )

    def writer(self) -> Any:
        """The model as it writes: a copy whose settings may be changed, with the same weights."""
        if self._exact is None or is_spread(self.model):
            return copy.copy(
                self.model
            )  # a spread one is run by methods that accelerate has put on it
        product = self._picker.mixed if self._picker else self._exact.product
        return with_product(self.model, self._exact.layer, product)

    @torch.inference_mode()
    def follow(self, name: str, argument: Any) -> None:
        """Run the part of this process in a forward pass that another one runs."""
        if name == "hidden":
            self.hidden(argument)
        elif name == "whole":
            self._whole(to_device(torch.tensor([argument]), self.device))
        else:
            assert name == "head"
            if isinstance(argument, slice):
                assert self._hidden_ND is not None
                argument = self._hidden_ND[argument]
            self._apply_head(argument.to(self.device))

    @property
    def logits_bytes(self) -> int:
        """Bytes of a logit."""
        return 4 if self.head_dtype else self.dtype.itemsize

    def _rows_per_piece(self, itemsize: int) -> int:
        limit = CUDA_LOGITS_BYTES if self.device.type == "cuda" else CPU_LOGITS_BYTES
        return max(8, limit // (self.vocab_size * itemsize) // 8 * 8)

    @torch.inference_mode()
    def hidden(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Compute the last hidden states [N, D] at all real positions of all sequences, in order; only if `head_only`.

        Args:
            sequences: of the same reach.
        """
        assert len({self.reach(len(ids)) for ids in sequences}) == 1
        length = max(map(len, sequences))
        ids_BT = torch.zeros(len(sequences), length, dtype=torch.long)
        for row_T, ids in zip(ids_BT, sequences, strict=True):
            row_T[: len(ids)] = torch.tensor(ids)
        with self._together("hidden", [list(ids) for ids in sequences]):
            ids_BT = to_device(ids_BT, self.device)
            self.forget()
            hidden_BTD = self._body(input_ids=ids_BT, use_cache=False)[0]
        starts = range(0, len(sequences) * length, length)
        real_N = torch.cat(
            [
                torch.arange(start, start + len(ids))
                for start, ids in zip(starts, sequences, strict=True)
            ]
        )
        real_N = to_device(real_N, hidden_BTD.device)
        real_ND: Tensor = hidden_BTD.flatten(0, 1).index_select(0, real_N)
        if self._is_split:
            self._hidden_ND = real_ND
        return real_ND

    def _apply_head(self, hidden_ND: Tensor) -> Tensor:
        return _apply(self._head, hidden_ND)

    def _whole(self, ids_BT: Tensor) -> Tensor:
        self.forget()
        logits_BTV: Tensor = self._view(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV

    @torch.inference_mode()
    def _probe(self) -> tuple[int, bool]:
        """Compare the ways to the logits on prefixes of one random text: (V of the logits, whether the head can run alone)."""
        vocab = self.model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(0)
        ids_T = torch.randint(vocab, (PROBE_LENGTHS[0],), generator=generator)
        prefixes = [ids_T[:length].tolist() for length in PROBE_LENGTHS]

        alone_TV = self._of_text(ids_T).float()
        self.vocab_size, self.logits_device = alone_TV.shape[1], alone_TV.device
        if not bool(alone_TV.isfinite().any(-1).all()) or bool(alone_TV.isnan().any()):
            raise ValueError(
                f"the teacher's logits are NaN or infinite in {self.dtype}; try another teacher.dtype, "
                "or check the weights"
            )
        expected_NV = torch.cat([alone_TV[:length] for length in PROBE_LENGTHS])

        tolerance = PROBE_TOLERANCE[self.dtype]
        shorter = [self._of_text(torch.tensor(ids)) for ids in prefixes]
        if not (change := error(torch.cat(shorter), expected_NV)) <= tolerance:
            raise ValueError(
                f"{type(self.model).__name__} is not a causal language model: its logits at a position change "
                f"by {change:.2g} standard deviations when later tokens are cut off; use a decoder-only model"
            )
        try:
            self._body, self._head = body_of(self.model), head_of(self.model)
            self.head_only = True
            batches: dict[int, list[list[int]]] = {}
            for ids in prefixes:
                batches.setdefault(self.reach(len(ids)), []).append(ids)
            ours = torch.cat([piece for batch in batches.values() for piece in self.logits(batch)])
            is_right = ours.shape == expected_NV.shape and error(ours, expected_NV) <= tolerance
            self.logits_device = ours.device if is_right else alone_TV.device
            return self.vocab_size, is_right
        except torch.OutOfMemoryError:
            raise
        except Exception:  # an architecture whose forward does not come apart
            return self.vocab_size, False

    def _of_text(self, ids_T: Tensor) -> Tensor:
        """[T, V] of a text alone, through the whole model.

        Raises:
            ValueError: the model does not take that.
        """
        name = type(self.model).__name__
        try:
            logits_TV = self._whole(ids_T[None].to(self.device))[0]
            if len(logits_TV) == len(ids_T):
                return logits_TV
            problem = f"it yields {len(logits_TV)} rows of logits for {len(ids_T)} tokens"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the code of a model comes to that misses its picture
            if self._is_split:
                raise  # it may be about the other processes
            said = (" ".join(str(error).split()) or "no message")[:200]
            problem = f"{type(error).__name__}: {said}"
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{name} is not a causal language model, but an encoder–decoder; use a decoder-only model"
            )
        raise ValueError(
            f"{name} does not run on text alone ({problem}); use a text model, or correct config.json"
        )

    def _use_float32(self) -> None:
        """Have logits in float32 from here on; where they cannot be had, note it."""
        if is_float32(self.model):
            return
        vocab = self.model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(vocab, (1, PROBE_LENGTHS[-1]), generator=generator)
        hidden_ND = self.hidden(ids.tolist()) if self.head_only else None

        def run(view: Any) -> Tensor:
            if hidden_ND is not None:
                # One row may be computed by other kernels than several.
                return torch.cat([_apply(view, hidden_ND), _apply(view, hidden_ND[:1])])
            self.forget()
            logits_BTV: Tensor = view(input_ids=ids.to(self.device), use_cache=False).logits
            return logits_BTV[0]

        own = self.model if hidden_ND is None else self._head
        self._exact = find(own, run, device=self.device)
        if self._exact is None:
            self._rounds = True
            return
        self.head_dtype = "float32"
        if hidden_ND is None:
            self._view = self._exact.view
            return
        self._rounded_head, self._head = own, self._exact.view
        if self.device.type == "cpu" and not self._is_split:
            self._picker = find_picker(own, self._exact, hidden_ND)


def _apply(head: Any, hidden_ND: Tensor) -> Tensor:
    logits_1NV: Tensor = head(inputs_embeds=hidden_ND[None], use_cache=False).logits
    return logits_1NV[0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_spread(model: Any) -> bool:
    """Whether accelerate has placed the parts of a model on devices, and moves what passes between them."""
    return hasattr(model, "hf_device_map") and hasattr(model, "_hf_hook")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device; on a GPU through pinned memory, so that nothing waits for the copy."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _check_tokenizer(model: Any, tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, which is needed to know each token's place in the text; save a fast one beside the model"
        )
    embeddings = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= embeddings:
        raise ValueError(
            f"the tokenizer has ids up to {highest}, but the model knows only {embeddings} tokens, so it is not the model's own tokenizer; use that"
        )
