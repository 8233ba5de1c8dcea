"""For student trainers: load a logit dataset, put it into the student's vocabulary, and learn from it."""

from builder.student.load import load_logits
from builder.student.losses import distillation_loss, distillation_loss_from_hidden
from builder.student.retokenize import TokenizerProjection
from builder.student.vocabulary import FrequentTokens

__all__ = [
    "FrequentTokens",
    "TokenizerProjection",
    "distillation_loss",
    "distillation_loss_from_hidden",
    "load_logits",
]
