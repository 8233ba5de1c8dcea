"""A checkpoint's config.json → how its attention can be computed: what is best where a recipe leaves it open, and what must not be.

How:  the class of the model says whether it takes torch's `scaled_dot_product_attention`, which is as exact as the plain formula
      ("eager"), faster and smaller. transformers would choose in the same way. It is asked here, before any weight is loaded, so that the
      choice is in the plan of a build.

      What runs is what the recipe says, and no other code. Where the package `kernels` happens to be installed, transformers puts a
      kernel from the Hub in the place of a flash attention that is not installed, or that a class does not list. That is refused.

Cost: reading config.json, which is in the cache when the teacher is loaded.
"""

import re
from pathlib import Path
from typing import Any

from transformers import MODEL_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations import hub_kernels
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

from builder.checkpoint import gguf
from builder.teacher.multimodal import family_of


def best_attention(
    location: str,
    *,
    commit: str | None = None,
    trust_remote_code: bool = False,
    config: str | None = None,
) -> str:
    """The best attention that a teacher's class supports, by its config.json alone; arguments as for `load_teacher`.

    Where the class cannot be found, it is that of most classes: what loads the teacher says what is wrong with it.

    Raises:
        ValueError: the Hub cannot be reached.
    """
    try:
        found = config_of(location, commit, trust_remote_code, config)
        classes = [
            _class_for(found, location, commit, trust_remote_code),
            *_classes_of_towers(found),
        ]
    except Exception as error:  # whatever reading a stranger's file, or running its code, comes to
        if "couldn't connect" in str(error):  # what loads would wait as long for each of its files
            raise ValueError(
                f"teacher {location}: it is not in the cache, and the Hub cannot be reached; check the network, or use "
                "teacher.path"
            ) from None
        return "sdpa"
    return "sdpa" if all(part._supports_sdpa for part in classes) else "eager"


def class_of(
    location: str,
    *,
    commit: str | None = None,
    trust_remote_code: bool = False,
    config: str | None = None,
) -> Any:
    """The class of a teacher, as transformers would choose it in its family (`multimodal.family_of`).

    Raises:
        LookupError: there is none.
    """
    found = config_of(location, commit, trust_remote_code, config)
    return _class_for(found, location, commit, trust_remote_code)


def config_of(location: str, commit: str | None, trust: bool, config: str | None) -> Any:
    """A teacher's configuration as transformers reads it, without its weights."""
    path = Path(location)
    if path.suffix == ".gguf":
        return gguf.read_config(path, config=Path(config) if config else None)
    return AutoConfig.from_pretrained(location, revision=commit, trust_remote_code=trust)


def _class_for(found: Any, location: str, commit: str | None, trust: bool) -> Any:
    family = family_of(found, trust_remote_code=trust)
    reference = getattr(found, "auto_map", {}).get(family.__name__)
    if reference and trust:
        return get_class_from_dynamic_module(reference, location, revision=commit)
    classes: Any = family._model_mapping[type(found)]
    named = {c.__name__: c for c in (classes if isinstance(classes, list | tuple) else [classes])}
    asked = [named[name] for name in found.architectures or () if name in named]
    return (asked or list(named.values()))[0]


def _classes_of_towers(config: Any) -> list[Any]:
    """Of a class that is made of several: transformers gives the parts the attention of the whole."""
    if family_of(config) is AutoModelForCausalLM:
        return []
    parts: list[Any] = [type(getattr(config, name, None)) for name in config.sub_configs]
    return [MODEL_MAPPING[part] for part in parts if part in MODEL_MAPPING]


def check_attention(attention: str, model_class: Any) -> None:
    """See that transformers would run what is asked for, and nothing else in its place.

    Raises:
        ValueError: a class does not support it, a package is missing, or transformers would choose a kernel of its own.
    """
    name = model_class.__name__
    if attention == "sdpa" and not model_class._supports_sdpa:
        raise ValueError(
            f'{name} has no "sdpa" attention; use teacher.attention = "eager", or leave it out'
        )
    flash = re.fullmatch(r"flash_attention_(\d)", attention)
    if not (flash or is_kernel(attention)):
        return
    if not model_class._supports_flash_attn:
        raise ValueError(f"{name} has no flash attention; leave teacher.attention out")
    listed = model_class._compatible_flash_implementations
    if listed and attention not in listed:
        raise ValueError(
            f"{name} runs with {' or '.join(listed)} only, which a recipe cannot pin; leave "
            "teacher.attention out"
        )
    if (
        flash
        and not FLASH_ATTENTION_COMPATIBILITY_MATRIX[int(flash[1])]["general_availability_check"]()
    ):
        raise ValueError(
            f"teacher.attention is {attention!r}, whose package is not installed (or finds no GPU): install flash-attn "
            f"{flash[1]}, or leave teacher.attention out"
        )


def is_kernel(attention: str) -> bool:
    """Whether an attention is a kernel of the Hub."""
    return bool(hub_kernels.is_kernel(attention))
