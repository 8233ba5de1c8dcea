"""For student trainers: load a logit dataset, put it into the student's vocabulary, and learn from it."""

from logit_dataset.collator import LogitCollator
from logit_dataset.load import load_logits
from logit_dataset.losses import distillation_loss, distillation_loss_from_hidden
from logit_dataset.retokenize import TokenizerProjection
from logit_dataset.vocabulary import FrequentTokens

__all__ = [
    "FrequentTokens",
    "LogitCollator",
    "TokenizerProjection",
    "distillation_loss",
    "distillation_loss_from_hidden",
    "load_logits",
]
