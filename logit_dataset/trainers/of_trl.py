"""TRL's SFTTrainer, with the distributions of a dataset for targets.

In:   a student, an SFTConfig, and rows of `load_dataset`.
Out:  what an SFTTrainer gives, and the metrics of `evaluation`.

How:  given these rows as they are, an SFTTrainer trains on their text alone, without a word. Its preparation is skipped, for the rows are
      prepared; cutting and packing are the collator's.
"""

from typing import Any

from trl import SFTConfig, SFTTrainer

from logit_dataset.divergences import Loss
from logit_dataset.hidden.head import TeacherHead
from logit_dataset.rows import Projection
from logit_dataset.trainers.distilling import Distilling, as_arrays, collator_for

OF_THE_COLLATOR = {"packing": False, "padding_free": False, "assistant_only_loss": False}
"""Of SFTConfig: what a LogitCollator and the dataset decide, and what it has to be."""


class DistillationSFTTrainer(Distilling, SFTTrainer):
    """An SFTTrainer whose students learn from a teacher's distributions. `peft_config` and everything else are as in `trl.SFTTrainer`.

    `max_length` has no effect: the collator sets the length.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        loss: Loss | None = None,
        temperature: float = 1.0,
        text_weight: float = 0.0,
        teacher_head: TeacherHead | None = None,
        projection: Projection | None = None,
        **options: Any,
    ) -> None:
        """Set up the training.

        Args:
            model, data_collator, train_dataset, eval_dataset, loss, temperature, text_weight, teacher_head, projection: as in DistillationTrainer.
            args: of the training.
            options: as in SFTTrainer.

        Raises:
            ValueError: an argument would have no effect, or data would be lost.
        """
        if not isinstance(args, SFTConfig):
            raise ValueError(f"args is {type(args).__name__}, expected a trl.SFTConfig")
        for name, expected in OF_THE_COLLATOR.items():
            if getattr(args, name, expected) != expected:
                raise ValueError(
                    f"{name} would lose the distributions; leave it out, and give data_collator=LogitCollator.of(…), which packs with "
                    "packed=True and learns completions where the dataset has them"
                )
        for name in ("compute_loss_func", "formatting_func"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} would be of no effect on rows of a logit dataset; leave it out"
                )
        if getattr(args, "loss_type", "nll") != "nll":
            raise ValueError(
                f"loss_type {args.loss_type!r} would be of no effect; the loss is loss="
            )
        collator = collator_for(train_dataset, data_collator, projection, args)
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__init__(
            model,
            args,
            collator,
            as_arrays(train_dataset),
            as_arrays(eval_dataset),
            **options,
        )
        self.set_loss(loss, temperature, text_weight, teacher_head)
