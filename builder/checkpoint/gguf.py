"""A GGUF file → a float32 model like any other.

In:   a GGUF file; the original config.json, where the file cannot say enough.
Out:  a model in which every tensor of the file has its place.

How:  transformers unpacks and renames the tensors. It leaves out those that it has no place for, fills what is missing with random
      numbers, and takes little more than sizes from the file's metadata. So the configuration is made here (`gguf_config`), and
      tensors are counted afterwards: each has to have a home.

Cost: the weights are read once. 135 million in blocks of four bits take 15 s on two cores.
"""

import io
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils.quantization_config import GgufConfig

from builder.checkpoint.checkpoint import named
from builder.checkpoint.gguf_config import architecture, make_config
from builder.checkpoint.gguf_metadata import ALWAYS, FACTORS, LONG, SHORT, Metadata

PLAIN = ("F64", "F32", "F16", "BF16")
"""Types of tensors whose numbers are stored as such."""
RENAMED = {"mistral": "llama"}
"""Model types of transformers for whose tensors it has no names in GGUF files, though they are another type's."""


def open_gguf(path: Path) -> Any:
    """A GGUF file, whose tensors are read when they are asked for.

    Raises:
        ValueError: packages are missing, or it is not a whole GGUF file.
    """
    try:
        import accelerate  # noqa: F401 – transformers needs it to dequantise
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(
            "a GGUF teacher needs two more packages; run: pip install gguf accelerate"
        ) from None
    try:
        return GGUFReader(path)
    except (ValueError, LookupError) as error:
        raise ValueError(
            f"{named(str(path.absolute()))}: it is not a complete GGUF file ({error}); download it again"
        ) from None


def read_config(path: Path, *, config: Path | None = None) -> PreTrainedConfig:
    """The configuration of a GGUF file's model, without its weights; arguments and errors as for `load_model`."""
    return _read(path, config)[2]


def load_model(path: Path, *, config: Path | None) -> tuple[Any, dict[str, Any] | None]:
    """Dequantise a GGUF file.

    Args:
        path: of the file.
        config: the original config.json or its directory, in place of what the file says of the model.

    Returns:
        The model in float32, and how the file packs its weights, as plain JSON values: None if it stores plain numbers.

    Raises:
        ValueError: packages are missing, the file is damaged, or it holds something for which transformers has no place.
    """
    reader, metadata, made = _read(path, config)
    try:
        model = _load(path, reader, metadata, made)
    except ValueError as error:
        raise ValueError(f"{named(str(path.absolute()))}: {error}") from None
    packed = sorted({tensor.tensor_type.name for tensor in reader.tensors} - set(PLAIN))
    return model, {"method": "gguf", "stored_as": packed, "dequantised": True} if packed else None


def _read(path: Path, config: Path | None) -> tuple[Any, Metadata, PreTrainedConfig]:
    reader = open_gguf(path)
    try:
        metadata = _read_metadata(reader)
        return (
            reader,
            metadata,
            _given_config(metadata, config) if config else make_config(metadata),
        )
    except (ValueError, StrictDataclassError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{named(str(path.absolute()))}: {message}") from None


def _load(path: Path, reader: Any, metadata: Metadata, config: PreTrainedConfig) -> Any:
    try:
        with _renamed(config), _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(path.parent),
                gguf_file=path.name,
                config=config,
                dtype=torch.float32,
                # Else weights stay packed where the package kernels is, and run code from the Hub.
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            model, report = loaded
            homeless = _homeless(model, reader, metadata, report)
    except (ValueError, LookupError, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(_explain(error)) from None
    model.config.model_type = config.model_type
    if homeless:
        raise ValueError(
            f"it has {homeless[0]}{_more(homeless)}, which {type(model).__name__} does not use, so it would not be the model that was trained;"
            " name the original config.json as teacher.config, or use the model's safetensors files"
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"it has no tensor for {missing[0]}{_more(missing)}, which would be filled with random numbers; use a complete file"
        )
    _check_frequencies(model, metadata)
    return model


def _explain(error: Exception) -> str:
    message = " ".join(str(error).split())
    if "ignore_mismatched_sizes" in message:
        return "its tensors have other shapes than its configuration says; name the config.json of the model that was converted"
    if isinstance(error, KeyError):
        return f"transformers has no place for {message}; use the model's safetensors files"
    return f"transformers cannot read it ({message[:200]}); use the model's safetensors files"


def _read_metadata(reader: Any) -> Metadata:
    """What a file says, without its vocabulary."""
    from gguf import dequantize

    fields: dict[str, Any] = {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("tokenizer.") or key.endswith("_token_id")
    }
    if "general.architecture" not in fields:
        raise ValueError("it does not name its architecture; convert it again")
    if (kind := fields.get("general.type", "model")) != "model":
        raise ValueError(
            f"it is of the type {kind!r}, not a model; merge it with its base model first"
        )
    if (parts := fields.get("split.count", 1)) > 1:
        raise ValueError(f"it is one of {parts} parts; join them with: llama-gguf-split --merge")
    # GGUF counts dimensions from the one that varies fastest.
    shapes = {t.name: tuple(int(size) for size in reversed(t.shape)) for t in reader.tensors}
    factors = {
        t.name.removesuffix(".weight"): [float(each) for each in dequantize(t.data, t.tensor_type)]
        for t in reader.tensors
        if t.name.removesuffix(".weight") in FACTORS
    }
    name = fields["general.architecture"]
    return Metadata(architecture=name, fields=fields, shapes=shapes, factors=factors)


def _given_config(metadata: Metadata, path: Path) -> PreTrainedConfig:
    """The configuration that the user names, if it can be that of the file."""
    known = architecture(metadata.architecture)
    try:
        loaded = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        message = " ".join(str(error).split()).replace(str(path), path.name)
        raise ValueError(f"teacher.config cannot be read ({message[:200]})") from None
    config: PreTrainedConfig = loaded.get_text_config()
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the original's files
    types = (known.model_type, *known.also)
    if config.model_type not in types:
        raise ValueError(
            f"teacher.config is of the type {config.model_type!r}, but the file is of the architecture "
            f"{metadata.architecture!r}, which is {' or '.join(map(repr, types))}; name the config.json of the model that was converted"
        )
    return config


def _homeless(model: Any, reader: Any, metadata: Metadata, report: Mapping[str, Any]) -> list[str]:
    """Tensors of a file that did not get into the model."""
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    if is_gguf_arch_supported(metadata.architecture):
        return sorted(report["unexpected_keys"])
    make: Any = TENSOR_PROCESSORS.get(metadata.architecture, TensorProcessor)
    homes: dict[str, str] = get_gguf_hf_weights_map(model, make(config={}))
    names = [tensor.name for tensor in reader.tensors]
    # Those of experts have no suffix in transformers.
    known = {*homes, *(f"{name}.weight" for name in homes), *(f"{name}.weight" for name in FACTORS)}
    return [name for name in names if name not in known]


def _check_frequencies(model: Any, metadata: Metadata) -> None:
    """See that the model divides rotary frequencies by the file's factors, whoever made its configuration."""
    factors = metadata.factors.get(ALWAYS, metadata.factors.get(SHORT))
    if factors is None:
        return
    rope = getattr(model.config, "rope_parameters", None) or {"rope_theta": 1.0}
    size = 2 * len(factors)
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    expected = rope["rope_theta"] ** -exponents / torch.tensor(factors, dtype=torch.float64)
    found = [
        b.double() for name, b in model.named_buffers() if name.endswith("rotary_emb.inv_freq")
    ]
    is_short = any(
        f.shape == expected.shape and torch.allclose(f, expected, 1e-4, 0) for f in found
    )
    long = metadata.factors.get(LONG)
    if not is_short or (long and not _are_close(rope.get("long_factor") or [], long)):
        raise ValueError(
            "the factors of rotary frequencies that it holds are not those of teacher.config; name the config.json of the model that "
            "was converted"
        )


def _are_close(some: list[float], others: list[float]) -> bool:
    return len(some) == len(others) and all(
        map(lambda a, b: math.isclose(a, b, rel_tol=1e-4), some, others)
    )


@contextmanager
def _renamed(config: Any) -> Iterator[None]:
    """Have transformers look for the tensors of a model under the names of the type that they are stored as."""
    name = config.model_type
    config.model_type = RENAMED.get(name, name)
    try:
        yield
    finally:
        config.model_type = name


def _quiet() -> AbstractContextManager[Any]:
    """Without the progress bar of dequantising, where nobody sees it move."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
