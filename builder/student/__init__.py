"""The former name of `logit_dataset`, for one version."""

import sys
import warnings
from importlib import import_module
from typing import Any

import logit_dataset
from logit_dataset import FrequentTokens, TokenizerProjection, load_logits

__all__ = [
    "FrequentTokens",
    "TokenizerProjection",
    "distillation_loss",
    "distillation_loss_from_hidden",
    "load_logits",
]

warnings.warn(
    "builder.student is logit_dataset now, and the losses' kind= is loss=; this name will be gone in the next version",
    FutureWarning,
    stacklevel=2,
)
for _name in (
    "batches",
    "divergences",
    "gather",
    "load",
    "losses",
    "retokenize",
    "rows",
    "vocabulary",
):
    sys.modules[f"{__name__}.{_name}"] = import_module(f"logit_dataset.{_name}")


def distillation_loss(*args: Any, kind: str | None = None, **options: Any) -> Any:
    """As `logit_dataset.distillation_loss`, with `kind=` for `loss=`."""
    return logit_dataset.distillation_loss(*args, **_renamed(kind, options))


def distillation_loss_from_hidden(*args: Any, kind: str | None = None, **options: Any) -> Any:
    """As `logit_dataset.distillation_loss_from_hidden`, with `kind=` for `loss=`."""
    return logit_dataset.distillation_loss_from_hidden(*args, **_renamed(kind, options))


def _renamed(kind: str | None, options: dict[str, Any]) -> dict[str, Any]:
    return options if kind is None else {"loss": kind, **options}
