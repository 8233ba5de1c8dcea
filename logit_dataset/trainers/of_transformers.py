"""The Trainer of transformers, with the distributions of a dataset for targets.

In:   a student, TrainingArguments, and rows of `load_dataset`.
Out:  what a Trainer gives, and the metrics of `evaluation`.
"""

from typing import Any

from transformers import Trainer, TrainingArguments

from logit_dataset.divergences import Loss
from logit_dataset.hidden.head import TeacherHead
from logit_dataset.rows import Projection
from logit_dataset.trainers.distilling import Distilling, as_arrays, collator_for


class DistillationTrainer(Distilling, Trainer):
    """A Trainer whose students learn from a teacher's distributions. Everything else is as in `transformers.Trainer`.

    Evaluation reports `eval_kl`, `eval_cross_entropy`, `eval_entropy`, `eval_teacher_entropy` and `eval_entropy_correlation`.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        loss: Loss | None = None,
        temperature: float = 1.0,
        text_weight: float = 0.0,
        teacher_head: TeacherHead | None = None,
        projection: Projection | None = None,
        peft_config: Any = None,
        **options: Any,
    ) -> None:
        """Set up the training.

        Args:
            model: a causal language model with as many logits as the dataset, or the projection, has ids.
            args: of the training.
            data_collator: a LogitCollator, such as `LogitCollator.of("ORG/NAME", packed=True, length=1024)`. None makes one from the training
                rows, which do not tell what follows a document.
            train_dataset: rows of a logit dataset.
            eval_dataset: rows of its held-out split, or several sets of rows by name.
            loss, temperature, text_weight: see `distillation_loss`. A loss of None is tail_draws if the rows have sampled tail tokens, and
                tail_bucket otherwise.
            teacher_head: from `load_teacher_head`, for a dataset with hidden states: the loss is the exact KL over the whole vocabulary.
            projection: into the student's vocabulary.
            peft_config: adapters to train instead of the model, through `peft.get_peft_model`.
            options: as in Trainer.

        Raises:
            ValueError: an argument would have no effect, or data would be lost.
        """
        args = args or TrainingArguments("tmp_trainer")
        if options.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func would be of no effect; the loss is loss=, or use transformers.Trainer with a LogitCollator"
            )
        rows = train_dataset if train_dataset is not None else eval_dataset
        collator = collator_for(rows, data_collator, projection, args)
        super().__init__(
            model if peft_config is None else _with_adapters(model, peft_config, args),
            args,
            collator,
            as_arrays(train_dataset),
            as_arrays(eval_dataset),
            **options,
        )
        self.set_loss(loss, temperature, text_weight, teacher_head)


def _with_adapters(model: Any, peft_config: Any, args: TrainingArguments) -> Any:
    from peft import get_peft_model

    if model is None:
        raise ValueError("peft_config needs a model; give model= instead of model_init=")
    adapted = get_peft_model(model, peft_config)
    names = (
        "activation_checkpointing",
        "gradient_checkpointing",
    )  # the latter before transformers 6
    if any(getattr(args, name, False) for name in names):
        adapted.enable_input_require_grads()
    return adapted
