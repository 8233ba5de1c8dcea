"""A directory, a repository on the Hub or a GGUF file → a Teacher, or its tokenizer alone; what is wrong, in one line.

How:  transformers loads. Weights are read from safetensors and GGUF only, for a pickle file can run code, and code from the Hub runs
      only where a recipe says so. A checkpoint that lacks a weight, and a GGUF file whose tokenizer cannot be rebuilt faithfully, are
      refused: both would work, and be wrong.
"""

import copy
import io
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from builder.teacher.model import Teacher, Together, is_spread
from builder.teacher.tokenizer import Origin, load, note_origin
from builder.teacher.tokenizer_files import TokenizerError

FAITHFUL_GGUF_PRETOKENIZERS = ("gpt-2", "smollm")
"""Values of `tokenizer.ggml.pre` for which the tokenizer rebuilt from a GGUF file is known to be right."""


def load_teacher(
    location: str,
    *,
    commit: str | None = None,
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    attention: str = "sdpa",
    device: str = "cpu",
    trust_remote_code: bool = False,
    spread: bool = False,
    split: Any = None,
    together: Together | None = None,
) -> Teacher:
    """Load a teacher from the Hub (at a commit), from a directory, or from a GGUF file.

    Args:
        location: Hub repository, directory, or path of a .gguf file.
        tokenizer: directory of the tokenizer, for a GGUF file whose own one cannot be rebuilt.
        attention: attention implementation as transformers names it.
        device: a torch device.
        spread: place whole layers on all GPUs (`device_map="auto"`), of which `device` is then the first used.
        split: a `transformers.distributed.DistributedConfig`, for a process that is in a group of `torch.distributed`.
        together: see `Teacher`.

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
            **({"device_map": "auto"} if spread else {}),
            **({"distributed_config": split} if split else {}),
        )
    first_device = torch.device(device)
    try:
        if split is not None:
            _check_split(model, split.tp_size)
        if is_spread(model):
            first_device = _first_device(model)
        return Teacher(model, loaded_tokenizer, device=first_device, together=together)
    except ValueError as error:
        raise ValueError(f"teacher {_display(location)}: {error}") from None


def load_tokenizer(
    location: str, *, commit: str | None = None, tokenizer: str | None = None
) -> Any:
    """The tokenizer of a teacher alone, without its weights; arguments and errors as for `load_teacher`."""
    if location.endswith(".gguf"):
        return _gguf_tokenizer(Path(location), Path(tokenizer) if tokenizer else None)
    return _tokenizer_at(location, revision=commit)


def _tokenizer_at(location: str, *, revision: str | None = None, trust: bool = False) -> Any:
    try:
        return load(location, commit=revision, trust_remote_code=trust)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
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
) -> tuple[Any, Any]:
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        # Tensors are only ever read from safetensors: a pickle file can run code.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location, use_safetensors=True, output_loading_info=True, **shared, **options
        )
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
    return model, _tokenizer_at(location, revision=revision, trust=trust_remote_code)


def _explain_load(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, TokenizerError):
        return message
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


def _first_device(model: Any) -> torch.device:
    """The device that takes the token ids of a model whose parts were placed on devices.

    Raises:
        ValueError: not all of them are on a GPU.
    """
    elsewhere = [name for name, place in model.hf_device_map.items() if place in ("cpu", "disk")]
    if elsewhere:
        raise ValueError(
            f"the GPUs have room for all but {len(elsewhere)} parts of it, such as {elsewhere[0]}, which would be moved there again "
            "for each batch; use more GPUs (--gpus-per-worker), or a 16-bit teacher.dtype"
        )
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _check_split(model: Any, size: int) -> None:
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (count := getattr(config, name, None)) and count % size:
            raise ValueError(
                f"teacher.tensor_parallel is {size}, by which {name} = {count} of the model cannot be divided; choose a divisor"
            )
