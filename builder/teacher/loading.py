"""A directory, a repository on the Hub or a GGUF file → a Teacher, or its tokenizer alone; what is wrong, in one line.

How:  transformers loads. Weights are read from safetensors and GGUF only, for a pickle file can run code, and code from the Hub runs
      only where a recipe says so. A checkpoint that lacks a weight, and a GGUF file whose tokenizer cannot be rebuilt faithfully, are
      refused: both would work, and be wrong.
"""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from builder.checkpoint import arrival, checkpoint, gguf
from builder.checkpoint.checkpoint import named
from builder.checkpoint.quantisation import describe, method_of
from builder.teacher.attention import (
    best_attention,
    check_attention,
    class_of,
    is_kernel,
)
from builder.teacher.model import HeadDtype, Teacher, Together, is_spread
from builder.teacher.multimodal import empty_towers, family_of
from builder.teacher.own import load_own
from builder.tokenizer.files import TokenizerError
from builder.tokenizer.tokenizer import Origin, load, note_origin

HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")
"""Asks torch for pages of 2 MB on a CPU, which it looks at once, before the first tensor: the results of a layer come and go, and in
batches of 16,384 tokens the system clears 200 small pages for each token (bfloat16: 5 % of a forward pass)."""
FAITHFUL_GGUF_PRETOKENIZERS = ("gpt-2", "smollm")
"""Values of `tokenizer.ggml.pre` for which the tokenizer rebuilt from a GGUF file is known to be right."""


def load_teacher(
    location: str,
    *,
    commit: str | None = None,
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    attention: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    spread: bool = False,
    split: Any = None,
    together: Together | None = None,
    config: str | None = None,
    head_dtype: HeadDtype = "float32",
    weights: Sequence[str] | None = None,
) -> Teacher:
    """Load a teacher from the Hub (at a commit), a directory, a GGUF file, or the user's Python code.

    Args:
        location: Hub repository, directory, or path of a .gguf or .py file.
        tokenizer: directory of the tokenizer, for a GGUF file whose own cannot be rebuilt.
        attention: attention implementation, as transformers names it; None for the best that the model's class supports.
        device: a torch device.
        spread: place whole layers on all GPUs (`device_map="auto"`); `device` is then the first one used.
        split: a `transformers.distributed.DistributedConfig`, for a process in a group of `torch.distributed`.
        together: see `Teacher`.
        config: original config.json or its directory, for a GGUF file that says too little about the model.
        head_dtype: see `Teacher`.
        weights: paths for a .py file, which is executed; None for all other teachers.

    Raises:
        ValueError: the teacher cannot be loaded; one line says what is wrong and what to do.
    """
    os.environ.setdefault(*HUGE_PAGES)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if weights is not None:
        return _load_own(
            Path(location), weights, torch_dtype, torch.device(device), head_dtype=head_dtype
        )
    code: dict[str, Any] = {"commit": commit, "trust_remote_code": trust_remote_code}
    attention = attention or best_attention(location, config=config, **code)
    if location.endswith(".gguf"):
        model, loaded_tokenizer, quantisation = _load_gguf(
            Path(location),
            tokenizer=Path(tokenizer) if tokenizer else None,
            config=Path(config) if config else None,
        )
        _check_attention(attention, location, type(model))
        model = model.to(torch_dtype)
        model.set_attn_implementation(attention)
    else:
        found = None
        with suppress(Exception):  # where it cannot be read, loading says why
            found = class_of(location, **code)
        _check_attention(attention, location, found)
        model, loaded_tokenizer, quantisation = _load_pretrained(
            location,
            revision=commit,
            trust_remote_code=trust_remote_code,
            dtype=torch_dtype,
            attn_implementation=attention,
            allow_all_kernels=is_kernel(attention),  # one that a recipe names is pinned and trusted
            **({"device_map": "auto"} if spread else {}),
            **({"distributed_config": split} if split else {}),
        )
    first_device, is_cut = torch.device(device), False
    try:
        if split is not None:
            _check_split(model, split.tp_size)
        if is_spread(model):
            first_device = _first_device(model)
        else:
            if split is None and quantisation is None:
                is_cut = empty_towers(model)
            model = model.to(first_device)
        arrival.check_values(model)
        return Teacher(
            model,
            loaded_tokenizer,
            device=first_device,
            together=together,
            quantisation=quantisation,
            head_dtype=head_dtype,
            is_cut=is_cut,
        )
    except ValueError as error:
        raise ValueError(f"{named(location)}: {error}") from None


def _load_own(
    path: Path,
    weights: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    head_dtype: HeadDtype,
) -> Teacher:
    try:
        own, own_tokenizer = load_own(path, weights, dtype=dtype)
        arrival.check_values(own)
        return Teacher(own.to(device), own_tokenizer, device=device, head_dtype=head_dtype)
    except ValueError as error:
        raise ValueError(f"{named(str(path))}: {error}") from error


def _check_attention(attention: str, location: str, model_class: Any) -> None:
    try:
        if model_class:
            check_attention(attention, model_class)
    except ValueError as error:
        raise ValueError(f"{named(location)}: {error}") from None


def load_tokenizer(
    location: str,
    *,
    commit: str | None = None,
    tokenizer: str | None = None,
    weights: Sequence[str] | None = None,
) -> Any:
    """Load the tokenizer of a teacher without its weights (a .py file makes both). Arguments and errors are those of `load_teacher`."""
    if weights is not None:
        return load_teacher(location, weights=weights).tokenizer
    if location.endswith(".gguf"):
        return _gguf_tokenizer(Path(location), Path(tokenizer) if tokenizer else None)
    return _tokenizer_at(location, revision=commit)


def _tokenizer_at(location: str, *, revision: str | None = None, trust: bool = False) -> Any:
    try:
        return load(location, commit=revision, trust_remote_code=trust)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{named(location)}: {_explain_load(error, location, revision)}") from None


def load_gguf(path: Path, *, tokenizer: Path | None) -> tuple[Any, Any]:
    """Dequantise a GGUF file into an ordinary float32 model and a tokenizer that is known to be right.

    Raises:
        ValueError: packages are missing, the file's tokenizer needs an unknown rule, or transformers has no place for something in the file.
    """
    model, right_tokenizer, _ = _load_gguf(path, tokenizer=tokenizer, config=None)
    return model, right_tokenizer


def _load_gguf(
    path: Path, *, tokenizer: Path | None, config: Path | None
) -> tuple[Any, Any, dict[str, Any] | None]:
    right_tokenizer = _gguf_tokenizer(path, tokenizer)
    model, quantisation = gguf.load_model(path, config=config)
    return model, right_tokenizer, quantisation


def _gguf_tokenizer(path: Path, tokenizer: Path | None) -> Any:
    """The tokenizer of a GGUF file.

    transformers rebuilds one from the file without its pre-tokenization rule. For SmolLM that drops the rule that
    every digit is a token of its own; it is put back here. Rules that cannot be vouched for are refused.
    """
    rule = gguf.open_gguf(path).get_field("tokenizer.ggml.pre")
    if tokenizer:
        return _tokenizer_at(str(tokenizer))
    rule_name = str(rule.contents()) if rule else "none"
    if rule_name not in FAITHFUL_GGUF_PRETOKENIZERS:
        raise ValueError(
            f"{path.name} tokenizes by the rule {rule_name!r}, which cannot be rebuilt faithfully from the file "
            f"(known: {', '.join(FAITHFUL_GGUF_PRETOKENIZERS)}); set teacher.tokenizer to a directory with "
            "the model's original tokenizer"
        )
    rebuilt = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    _restore_pretokenizer(rebuilt.backend_tokenizer, rule_name)
    return note_origin(rebuilt, Origin(source="gguf"))


def _restore_pretokenizer(backend: Any, rule_name: str) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence

    rules: list[PreTokenizer] = [ByteLevel(add_prefix_space=False, use_regex=True)]
    if rule_name == "smollm":
        rules.insert(0, Digits(individual_digits=True))
    backend.pre_tokenizer = Sequence(rules)


def _load_pretrained(
    location: str, *, revision: str | None, trust_remote_code: bool, **options: Any
) -> tuple[Any, Any, dict[str, Any] | None]:
    checkpoint.refuse_adapter(location, commit=revision)
    checkpoint.refuse_ambiguous(location)
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = checkpoint.read_config(location, commit=revision)
    family: Any = AutoModelForCausalLM
    with suppress(Exception):  # where it cannot be read, loading says why
        family = family_of(
            AutoConfig.from_pretrained(location, **shared), trust_remote_code=trust_remote_code
        )
    try:
        # Tensors are only ever read from safetensors: a pickle file can run code.
        loaded: Any = family.from_pretrained(
            location, use_safetensors=True, output_loading_info=True, **shared, **options
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a class comes to that a stranger's config.json is for
        raise ValueError(f"{named(location)}: {_explain_load(error, location, revision)}") from None
    model, report = loaded
    config = config or checkpoint.read_config(location, commit=revision)  # of the Hub
    stored, method = checkpoint.read_heads(location, commit=revision), method_of(config)
    try:
        arrival.check(model, report, config=config, stored=stored, method=method)
    except ValueError as error:
        raise ValueError(f"{named(location)}: {error}") from None
    tokenizer = _tokenizer_at(location, revision=revision, trust=trust_remote_code)
    return model, tokenizer, describe(model, config=config, stored=stored, method=method)


def _explain_load(error: Exception, location: str, commit: str | None) -> str:
    message = " ".join(str(error).split())
    if Path(location).is_absolute():
        message = message.replace(location, Path(location).name)
    said = arrival.quantisation_of(checkpoint.read_config(location, commit=commit))
    if missing := checkpoint.explain_missing(location):
        return missing
    if isinstance(error, TokenizerError):
        return message
    if "trust_remote_code" in message:
        return "it needs code from its repo; set teacher.trust_remote_code and a full commit, if you trust it"
    if "Unrecognized configuration class" in message:
        return "it is not a causal language model that transformers knows (an encoder or an encoder–decoder?); use a decoder-only model"
    if "model.safetensors" in message:
        return "it has no model.safetensors, and other formats are not read because pickle files can run code; save the model again with save_pretrained"
    if "Unrecognized model" in message:
        return "it has no config.json with a model_type that transformers knows; name a directory written by save_pretrained"
    if "FlashAttention" in message:
        return f'{message.split(". ")[0][:200].rstrip(".")}; use teacher.attention = "sdpa"'
    if "couldn't connect" in message or "HF_HUB_OFFLINE" in message:
        return "it is not in the cache, and the Hub cannot be reached; check the network, or use teacher.path"
    if "ignore_mismatched_sizes" in message or "automatic conversion" in message:
        if said:
            return f"its weights are packed by {said.get('quant_method')}, which transformers does not unpack here; use another model"
        return "its weights have other shapes than its config.json says; download it again"
    if said and isinstance(error, ImportError):
        return (
            f"its weights are quantised by {said.get('quant_method')}, which needs a package that is not installed ({message[:200]}); "
            "install it, or use the unquantised model"
        )
    if isinstance(error, json.JSONDecodeError):
        return f"one of its JSON files is not valid ({error.msg} in line {error.lineno}, column {error.colno}); download it again"
    if isinstance(error, KeyError):
        return (
            f"its config.json cannot be read ({message[:200]}); correct it, or update transformers"
        )
    if isinstance(error, StrictDataclassError) or "not a valid JSON file" in message:
        return f"its config.json is not valid ({message[:200]}); correct it"
    if not isinstance(error, ValueError | OSError | ImportError | RuntimeError | SafetensorError):
        return f"it cannot be loaded from its files ({type(error).__name__}: {message[:200]}); correct them, or download it again"
    if "tiktoken" in message:
        return "it has no tokenizer.json, and other vocabulary files are not read; save it with save_pretrained of a fast tokenizer"
    if isinstance(error, SafetensorError):
        return f"its weights are damaged ({message[:100]}); download it again"
    if unknown := re.search("model type `([^`]+)` but Transformers does not recognize", message):
        return f"its config.json has model_type {unknown[1]!r}, which transformers {transformers.__version__} does not know; install a newer transformers, or use another teacher"
    return message.split(". ")[0][:300]


def _first_device(model: Any) -> torch.device:
    """The device that takes the token ids of a model whose parts were placed on devices.

    Raises:
        ValueError: not all of them are on a GPU.
    """
    elsewhere = [name for name, place in model.hf_device_map.items() if place in ("cpu", "disk")]
    if elsewhere:
        raise ValueError(
            f"the GPUs have no room for {len(elsewhere)} of its parts, such as {elsewhere[0]}, which would be moved to a GPU again for each batch; use more GPUs"
            " (--gpus-per-worker), or a 16-bit teacher.dtype"
        )
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _check_split(model: Any, size: int) -> None:
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (count := getattr(config, name, None)) and count % size:
            raise ValueError(
                f"teacher.tensor_parallel is {size}, which does not divide the model's {name} = {count}; choose a divisor"
            )
