"""For student trainers: load a logit dataset, put it into the student's vocabulary, and learn from it.

A name is fetched when it is first asked for: who only needs to know what a row is (`schema`) does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logit_dataset.batches import Batches
    from logit_dataset.collator import LogitCollator
    from logit_dataset.hidden.head import TeacherHead, load_teacher_head
    from logit_dataset.hidden.kl import dense_kl, dense_kl_from_hidden
    from logit_dataset.load import LogitDataset, load_logits
    from logit_dataset.losses import distillation_loss, distillation_loss_from_hidden
    from logit_dataset.retokenize import TokenizerProjection
    from logit_dataset.vocabulary import FrequentTokens

__all__ = [
    "Batches",
    "FrequentTokens",
    "LogitCollator",
    "LogitDataset",
    "TeacherHead",
    "TokenizerProjection",
    "dense_kl",
    "dense_kl_from_hidden",
    "distillation_loss",
    "distillation_loss_from_hidden",
    "load_logits",
    "load_teacher_head",
]

_HOMES = {
    "Batches": "batches",
    "FrequentTokens": "vocabulary",
    "LogitCollator": "collator",
    "LogitDataset": "load",
    "TeacherHead": "hidden.head",
    "TokenizerProjection": "retokenize",
    "dense_kl": "hidden.kl",
    "dense_kl_from_hidden": "hidden.kl",
    "distillation_loss": "losses",
    "distillation_loss_from_hidden": "losses",
    "load_logits": "load",
    "load_teacher_head": "hidden.head",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
