"""For student trainers: load a logit dataset, and learn from it."""

from builder.student.load import load_logits
from builder.student.losses import distillation_loss, distillation_loss_from_hidden

__all__ = ["distillation_loss", "distillation_loss_from_hidden", "load_logits"]
