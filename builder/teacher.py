"""Token ids → the raw logits at every real position, from a frozen language model.

In:   sequences of token ids, unpadded, of any lengths.
Out:  pieces of [n, V] raw logits, in order: all positions of the first sequence, then of the second, and so on.

How:  sequences are padded on the right; under causal attention no real position can see the padding, so no mask is
      needed and nothing leaks. The body of the model runs once over [B, T]; the head runs over real positions only,
      in pieces of a fixed size, so memory does not grow with B · T · V.

      Some architectures do more than a matrix product after the body (soft-capping, logit scales, an `embed_out`).
      Instead of a table of them, the head here is the model's own forward method with the body replaced by one that
      hands over given hidden states. At load both are compared with the whole model, one sequence at a time; where they
      differ, the whole model is used instead, and where even that is not causal, the teacher is refused.

Shape suffixes: B sequences, T positions, N real positions, V vocabulary, D hidden.
"""

import copy
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

CPU_LOGITS_BYTES, CUDA_LOGITS_BYTES = 64 * 2**20, 256 * 2**20
"""Logits that exist at once, however large V is: enough rows for a matrix product at full speed, few enough to fit anywhere."""

PROBE_LENGTHS = (24, 13, 5)
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest mean |Δ logit| between two ways to compute the same, in standard deviations of the logits: rounding noise
stays ten times below, while a missing scale, a leak or a shift exceeds it."""

FAITHFUL_GGUF_PRETOKENIZERS = ("gpt-2", "smollm")
"""Values of `tokenizer.ggml.pre` for which the tokenizer rebuilt from a GGUF file is known to be right."""


class Teacher:
    """A frozen causal language model with its tokenizer, ready to run."""

    def __init__(self, model: Any, tokenizer: Any, *, device: torch.device) -> None:
        """Wrap a loaded model, and find out which way to its logits is right.

        Raises:
            ValueError: the model is not causal, its logits hold NaN, or the tokenizer does not fit it.
        """
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.device = device
        self.dtype: torch.dtype = model.dtype
        _check_tokenizer(model, tokenizer)
        self._head = _head_of(self.model)
        self.vocab_size, self.head_only = self._probe()
        self.hidden_size = self.hidden([[0]]).shape[1] if self.head_only else None
        """Of what the head takes, which need not be what the body's layers work on; None where it cannot run alone."""

    @property
    def max_length(self) -> int | None:
        """Longest sequence that the model was made for, where its configuration says so."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return int(limit) if limit else None

    def provenance(self) -> dict[str, Any]:
        """What the loaded teacher is, beyond where it came from: plain JSON values."""
        tokenizer_json = self.tokenizer.backend_tokenizer.to_str()
        return {
            "architecture": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "tokenizer_vocab_size": len(self.tokenizer),
            "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
            "eos_token_id": self.tokenizer.eos_token_id,
        }

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Raw logits of every position of every sequence, in order, in pieces of [n, V] on the device."""
        if not self.head_only:
            for ids in sequences:
                ids_1T = to_device(torch.tensor([list(ids)]), self.device)
                logits_TV = self._whole(ids_1T)[0]
                yield from logits_TV.split(self._rows_per_piece)
            return
        yield from self.head(self.hidden(sequences))

    @torch.inference_mode()
    def head(self, hidden_ND: Tensor) -> Iterator[Tensor]:
        """Raw logits of given last hidden states, in pieces of [n, V]; only where `head_only`."""
        for piece_ND in hidden_ND.split(self._rows_per_piece):
            yield self._apply_head(piece_ND)

    @property
    def _rows_per_piece(self) -> int:
        limit = CUDA_LOGITS_BYTES if self.device.type == "cuda" else CPU_LOGITS_BYTES
        return max(8, limit // (self.vocab_size * self.dtype.itemsize) // 8 * 8)

    @torch.inference_mode()
    def hidden(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """[N, D] last hidden states of all real positions of all sequences, in order; only where `head_only`."""
        length = max(map(len, sequences))
        ids_BT = torch.zeros(len(sequences), length, dtype=torch.long)
        for row_T, ids in zip(ids_BT, sequences, strict=True):
            row_T[: len(ids)] = torch.tensor(ids)
        ids_BT = to_device(ids_BT, self.device)
        hidden_BTD = self.model.base_model(input_ids=ids_BT, use_cache=False)[0]
        starts = range(0, len(sequences) * length, length)
        real_N = torch.cat(
            [
                torch.arange(start, start + len(ids))
                for start, ids in zip(starts, sequences, strict=True)
            ]
        )
        real_ND: Tensor = hidden_BTD.flatten(0, 1).index_select(0, to_device(real_N, self.device))
        return real_ND

    def _apply_head(self, hidden_ND: Tensor) -> Tensor:
        logits_1NV: Tensor = self._head(inputs_embeds=hidden_ND[None], use_cache=False).logits
        return logits_1NV[0]

    def _whole(self, ids_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV

    @torch.inference_mode()
    def _probe(self) -> tuple[int, bool]:
        """Compare the ways to the logits on prefixes of one random text: (V of the logits, whether the head can run alone)."""
        vocab = self.model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(0)
        ids_T = torch.randint(vocab, (PROBE_LENGTHS[0],), generator=generator)
        prefixes = [ids_T[:length].tolist() for length in PROBE_LENGTHS]

        alone_TV = self._whole(ids_T[None].to(self.device))[0].float()
        self.vocab_size = alone_TV.shape[1]
        if not bool(alone_TV.isfinite().any(-1).all()) or bool(alone_TV.isnan().any()):
            raise ValueError(
                f"the teacher's logits are NaN or infinite in {self.dtype}; try another teacher.dtype, "
                "or check the weights"
            )
        expected_NV = torch.cat([alone_TV[:length] for length in PROBE_LENGTHS])

        def error(logits_NV: Tensor) -> float:
            finite = expected_NV.isfinite()  # some models mask a part of the vocabulary with −inf
            difference = (logits_NV.float() - expected_NV)[finite].abs().mean()
            return float(difference / expected_NV[finite].std().clamp(min=1e-6))

        tolerance = PROBE_TOLERANCE[self.dtype]
        shorter = [self._whole(torch.tensor([ids], device=self.device))[0] for ids in prefixes]
        if not (change := error(torch.cat(shorter))) <= tolerance:
            raise ValueError(
                f"{type(self.model).__name__} is not a causal language model: its logits at a position change "
                f"by {change:.2g} standard deviations when later tokens are cut off; use a decoder-only model"
            )
        try:
            self.head_only = True
            ours = torch.cat(list(self.logits(prefixes)))
            return self.vocab_size, ours.shape == expected_NV.shape and error(ours) <= tolerance
        except (AttributeError, TypeError, RuntimeError, IndexError):
            return self.vocab_size, False  # an architecture whose forward does not come apart


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device; on a GPU through pinned memory, so that nothing waits for the copy."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class _Handover(nn.Module):
    """Stands where a model's body was, and returns the hidden states that it is given as inputs_embeds."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> "_Handed":
        return _Handed(last_hidden_state=inputs_embeds)


class _Handed(BaseModelOutput):
    """A body's output that answers None for whatever else a head may ask for (router logits, caches, …)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _head_of(model: Any) -> Any:
    """A view of the model that shares its weights, whose body hands over given hidden states."""
    head = copy.copy(model)
    head._modules = dict(model._modules)
    head._modules[model.base_model_prefix] = _Handover()
    return head


def load_teacher(
    location: str,
    *,
    commit: str | None = None,
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    attention: str = "sdpa",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Teacher:
    """Load a teacher from the Hub (at a commit), from a directory, or from a GGUF file.

    Args:
        location: Hub repository, directory, or path of a .gguf file.
        tokenizer: directory of the tokenizer, for a GGUF file whose own one cannot be rebuilt.
        attention: attention implementation as transformers names it.
        device: a torch device.

    Raises:
        ValueError: with one line on what is wrong with this teacher and what to do.
    """
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if location.endswith(".gguf"):
        tokenizer_directory = Path(tokenizer) if tokenizer else None
        model, loaded_tokenizer = load_gguf(Path(location), tokenizer=tokenizer_directory)
        model = model.to(torch_dtype)
        model.set_attn_implementation(attention)
    else:
        model, loaded_tokenizer = _load_pretrained(
            location,
            revision=commit,
            trust_remote_code=trust_remote_code,
            dtype=torch_dtype,
            attn_implementation=attention,
        )
    try:
        return Teacher(model, loaded_tokenizer, device=torch.device(device))
    except ValueError as error:
        raise ValueError(f"teacher {_display(location)}: {error}") from None


def load_tokenizer(
    location: str, *, commit: str | None = None, tokenizer: str | None = None
) -> Any:
    """The tokenizer of a teacher alone, without its weights; arguments and errors as for `load_teacher`."""
    if location.endswith(".gguf"):
        return _gguf_tokenizer(Path(location), Path(tokenizer) if tokenizer else None)
    try:
        # Said outright: left open, transformers asks on the terminal whether to run the repo's code.
        return AutoTokenizer.from_pretrained(location, revision=commit, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"teacher {_display(location)}: {_explain_load(error)}") from None


def load_gguf(path: Path, *, tokenizer: Path | None) -> tuple[Any, Any]:
    """Dequantise a GGUF file: a float32 model like any other, and a tokenizer that is known to be right.

    Raises:
        ValueError: packages are missing, or the file's tokenizer needs a rule that is not known here.
    """
    right_tokenizer = _gguf_tokenizer(path, tokenizer)
    with (
        nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    ):  # its progress bar
        loaded = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    # Buffers outside the state dict (rotary frequencies) were made on "meta" and hold no values there.
    for name, buffer in loaded.named_buffers():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer)
    return model, right_tokenizer


def _gguf_tokenizer(path: Path, tokenizer: Path | None) -> Any:
    """The tokenizer of a GGUF file.

    transformers rebuilds one from the file without its pre-tokenization rule. For SmolLM that drops the rule that
    every digit is a token of its own; it is put back here. Rules that cannot be vouched for are refused.
    """
    try:
        import accelerate  # noqa: F401 – transformers needs it to dequantise
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(
            "a GGUF teacher needs two more packages; run: pip install gguf accelerate"
        ) from None
    try:
        rule = GGUFReader(path).get_field("tokenizer.ggml.pre")
    except (ValueError, LookupError) as error:
        raise ValueError(
            f"teacher {path.name}: it is no whole GGUF file ({error}); download it again"
        ) from None
    if tokenizer:
        return AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False)
    rule_name = str(rule.contents()) if rule else "none"
    if rule_name not in FAITHFUL_GGUF_PRETOKENIZERS:
        raise ValueError(
            f"{path.name} tokenizes by the rule {rule_name!r}, which cannot be rebuilt faithfully from the file "
            f"(known: {', '.join(FAITHFUL_GGUF_PRETOKENIZERS)}); set teacher.tokenizer to a directory with "
            "the model's original tokenizer"
        )
    rebuilt = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    _restore_pretokenizer(rebuilt.backend_tokenizer, rule_name)
    return rebuilt


def _restore_pretokenizer(backend: Any, rule_name: str) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence

    rules: list[PreTokenizer] = [ByteLevel(add_prefix_space=False, use_regex=True)]
    if rule_name == "smollm":
        rules.insert(0, Digits(individual_digits=True))
    backend.pre_tokenizer = Sequence(rules)


def _load_pretrained(
    location: str, *, revision: str | None, trust_remote_code: bool, **options: Any
) -> tuple[Any, Any]:
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        # Tensors are only ever read from safetensors: a pickle file can run code.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location, use_safetensors=True, output_loading_info=True, **shared, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(location, **shared)
    except (ValueError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"teacher {_display(location)}: {_explain_load(error)}") from None
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"teacher {_display(location)}: the checkpoint has no {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which would be filled with random numbers; "
            "use a complete causal language model"
        )
    return model, tokenizer


def _explain_load(error: Exception) -> str:
    message = " ".join(str(error).split())
    if "trust_remote_code" in message:
        return "it needs code from its repo; set teacher.trust_remote_code and a full commit, if you trust it"
    if "Unrecognized configuration class" in message:
        return "it is not a causal language model that transformers knows (an encoder or an encoder–decoder?)"
    if "model.safetensors" in message:
        return (
            "it has no model.safetensors, and other weights are not read, for a pickle file can run code; "
            "save it again with save_pretrained"
        )
    if "Unrecognized model" in message:
        return "it has no config.json with a model_type that transformers knows; name a directory of save_pretrained"
    if "FlashAttention" in message:
        return f'{message.split(". ")[0][:200].rstrip(".")}; use teacher.attention = "sdpa"'
    if "couldn't connect" in message or "HF_HUB_OFFLINE" in message:
        return "it is not in the cache, and the Hub cannot be reached to fetch it; check the network, or use teacher.path"
    if "ignore_mismatched_sizes" in message:
        return "its weights have other shapes than its config.json says; download it again"
    if isinstance(error, SafetensorError):
        return f"its weights are damaged ({message[:100]}); download it again"
    return message.split(". ")[0][:300]


def _display(location: str) -> str:
    path = Path(location)
    return path.name if path.is_absolute() else location


def _check_tokenizer(model: Any, tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, which is needed to know each token's place in the text"
        )
    embeddings = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= embeddings:
        raise ValueError(
            f"the tokenizer has ids up to {highest}, but the model knows only {embeddings} tokens; "
            "this is not the model's own tokenizer"
        )
