"""A Python file of the user's → a model that transformers does not know, and its tokenizer.

In:   the file, which defines `load_teacher(*weights)`, and the paths of its weights. It returns a module, which makes logits [B, T, V] of
      ids [B, T], and a tokenizer: of `tokenizers`, a fast one of transformers, or the directory of one.
Out:  the module, as `Teacher` takes models, and a fast tokenizer.

How:  the file runs where a recipe of the user's names it, or `--teacher` does, and nowhere else: a dataset brings no code, and names none
      to be run. Whatever its code reads, the weights that came of it are hashed. What it imports has to be installed: a module that
      lies beside it would decide the data, too, and not be recorded.

      Its body and its head do not come apart, so each sequence runs alone.

Cost: a hash of the weights, a second a GB.
"""

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

FUNCTION = "load_teacher"
ATTENTION = "own"
"""What stands for the attention of such a teacher: it is its own."""
ATTRIBUTE = "max_length"
"""Of the module, if there is a longest sequence that it was made for."""


class OwnModel(nn.Module):
    """A module of the user's, in the shape that `Teacher` knows."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Hash its weights, and give them the type of the forward pass.

        Raises:
            ValueError: it does not make logits of ids.
        """
        super().__init__()
        self.state_sha256 = _state_sha256(module)
        self.own = module.eval().to(dtype)
        self.dtype = dtype
        longest = getattr(module, ATTRIBUTE, None)
        config_class: Any = PreTrainedConfig
        self.config = config_class(max_position_embeddings=longest)
        self.config._attn_implementation = ATTENTION
        with torch.inference_mode():
            self._vocab_size = self(torch.zeros(1, 1, dtype=torch.long)).logits.shape[-1]

    def get_input_embeddings(self) -> Any:
        """Something that says how many ids there are: as many as logits."""
        return nn.Embedding(self._vocab_size, 1, device="meta")

    def get_output_embeddings(self) -> None:
        """Its head is not known as one."""

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        """The logits of ids.

        Raises:
            ValueError: the module fails, or makes something else.
        """
        name, size = type(self.own).__name__, tuple(input_ids.shape)
        try:
            logits_BTV = self.own(input_ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{name} fails on ids of shape {size} ({_said(error)})") from error
        logits_BTV = getattr(logits_BTV, "logits", logits_BTV)
        if not isinstance(logits_BTV, Tensor):
            raise ValueError(
                f"{name} returns {type(logits_BTV).__name__} for ids of shape {size}, expected a tensor of logits, (B, T, V)"
            )
        if logits_BTV.ndim != 3 or logits_BTV.shape[:2] != input_ids.shape:
            raise ValueError(
                f"{name} returns the shape {tuple(logits_BTV.shape)} for ids of shape {size}, expected logits, (B, T, V)"
            )
        return CausalLMOutput(logits=logits_BTV)


def load_own(
    path: Path, weights: Sequence[str], *, dtype: torch.dtype
) -> tuple[OwnModel, PreTrainedTokenizerFast]:
    """Run a file of the user's: (its model in a type, its tokenizer).

    Raises:
        ValueError: its function is not there, fails, or returns something else; or it imports what is not recorded.
    """
    module, tokenizer = _run(path, weights)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{FUNCTION} returns {type(module).__name__} first, expected a torch.nn.Module"
        )
    # Messages, manifest and card name the user's class.
    model_class = type(type(module).__name__, (OwnModel,), {})
    return model_class(module, dtype), _as_fast(tokenizer, path.parent)


def _run(path: Path, weights: Sequence[str]) -> tuple[Any, Any]:
    before = set(sys.modules)
    found = _execute(path, weights)
    if found is None:
        raise ValueError(
            f"it has no function {FUNCTION}(*weights); define one that returns a module and its tokenizer"
        )
    _check_imports(path, before)
    returned = found[0]
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ValueError(
            f"{FUNCTION} returns {type(returned).__name__}, expected a module and its tokenizer"
        )
    return returned


def _execute(path: Path, weights: Sequence[str]) -> tuple[Any] | None:
    """What the function of a file returns; None if it has none."""
    name = f"_own_teacher_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    code = importlib.util.module_from_spec(spec)
    sys.modules[name] = code  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(code)
        function = getattr(code, FUNCTION, None)
        return (function(*map(Path, weights)),) if inspect.isfunction(function) else None
    except Exception as error:  # whatever the code of a user comes to
        raise ValueError(_said(error, path)) from error


def _said(error: Exception, path: Path | None = None) -> str:
    """An error of the user's code in a line, with the last place in the user's file."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if path and Path(frame.filename) == path
    ]
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    text = f"line {lines[-1]}: {text}" if lines else text
    return f"{text}; correct {path.name}" if path else text


def _check_imports(path: Path, before: set[str]) -> None:
    """See that a file has imported nothing that lies beside it, for nobody would know what that was."""
    for name in sorted(set(sys.modules) - before):
        file = getattr(sys.modules[name], "__file__", None)
        if not file or "site-packages" in Path(file).parts or Path(file) == path:
            continue
        if Path(file).resolve().is_relative_to(path.parent):
            raise ValueError(
                f"it imports {name} from beside it, which is not recorded; put all of the teacher's code into {path.name}, or install it"
            )


def _as_fast(tokenizer: Any, base: Path) -> PreTrainedTokenizerFast:
    if isinstance(tokenizer, Tokenizer):
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if isinstance(tokenizer, str | Path):
        from builder.tokenizer.tokenizer import load

        try:
            found: PreTrainedTokenizerFast = load(str(base / Path(tokenizer).expanduser()))
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            raise ValueError(
                f"{FUNCTION} returns {Path(tokenizer).name} as the directory of its tokenizer, which cannot be read ({_said(error)})"
            ) from None
        return found
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{FUNCTION} returns {type(tokenizer).__name__} second, expected a tokenizers.Tokenizer, a fast tokenizer of transformers, or "
            "the directory of one"
        )
    return tokenizer


def _state_sha256(module: nn.Module) -> str:
    """One hash of all parameters and buffers, as they were loaded, whatever they were read from."""
    digest = hashlib.sha256()
    with torch.inference_mode():
        for name, value in sorted([*module.named_parameters(), *module.named_buffers()]):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
