"""Trainers of transformers and TRL that learn from a dataset's distributions. They are imported when they are first asked for.

In:   rows of `load_dataset`, collated by a LogitCollator, and a student.
Out:  a trained student, and how near it is to its teacher.
First: distilling.py
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logit_dataset.trainers.of_transformers import DistillationTrainer
    from logit_dataset.trainers.of_trl import DistillationSFTTrainer

__all__ = ["DistillationSFTTrainer", "DistillationTrainer"]

_HOMES = {"DistillationTrainer": "of_transformers", "DistillationSFTTrainer": "of_trl"}
_PACKAGES = {"of_transformers": "transformers accelerate", "of_trl": "trl"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    try:
        return getattr(import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} needs {error.name}, which is not installed; pip install {_PACKAGES[home]}"
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
