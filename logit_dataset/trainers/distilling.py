"""What makes a Trainer learn from distributions: the loss, the counts by which gradients accumulate, and the evaluation.

In:   a trainer of transformers, or one that is made of it, and batches of a LogitCollator.
Out:  a trainer whose loss is `distillation_loss`, and whose evaluation says how near the student is to its teacher.

How:  the loss of a step is the mean over the positions of all batches over which gradients accumulate, in all processes: their counts are
      added up before the first of these batches is learned. Processes average gradients, so each divides by its share of the count.
      The evaluation adds up sums of each row of the dataset, so that a row which was given to two processes to make their batches equal
      in number counts once (a streamed dataset has no length by which these are known; there, some count twice).
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from logit_dataset.batches import Batches
from logit_dataset.collator import LogitCollator
from logit_dataset.divergences import Loss
from logit_dataset.hidden.head import TeacherHead
from logit_dataset.hidden.kl import dense_kl
from logit_dataset.losses import count_positions, distillation_loss
from logit_dataset.rows import Projection
from logit_dataset.trainers.evaluation import SUMS, metrics, row_sums


def collator_for(
    rows: Any, collator: Any, projection: Projection | None, args: Any
) -> LogitCollator | Any:
    """The `data_collator` of a trainer, of whose arguments what would lose the distributions is set right.

    Args:
        rows: the training data, or else those to evaluate on.
        collator: as it was given; None for one that knows of the dataset what its rows tell.
        projection: for the collator.
        args: the TrainingArguments. `remove_unused_columns` becomes False; and no process hands batches out to others.

    Raises:
        ValueError: the data are no rows, or an argument would be of no effect.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {args.label_smoothing_factor}, which no distillation has; leave it out (text_weight mixes text and "
            "teacher)"
        )
    if isinstance(rows, Batches):
        raise ValueError(
            "train_dataset holds ready batches, which a Trainer takes for rows; give it rows of load_dataset, and what they are made into "
            "to a LogitCollator (packed=True, length=…)"
        )
    args.remove_unused_columns = False
    if args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False  # batches differ in length
    if collator is None and isinstance(rows, Mapping):  # several to evaluate on
        rows = next(iter(rows.values()), None)
    if collator is None:
        collator = LogitCollator() if rows is None else LogitCollator.of(rows)
    if isinstance(collator, LogitCollator):
        return replace(collator, projection=projection or collator.projection, number_rows=True)
    if projection is not None:
        raise ValueError("a projection needs a LogitCollator; leave data_collator out, or give one")
    return collator


def as_arrays(rows: Any) -> Any:
    """Rows that come as arrays, as lists take twelve times as long; those of which somebody has chosen the format are left as they are."""
    if isinstance(rows, Mapping):
        return {name: as_arrays(part) for name, part in rows.items()}
    is_unsaid = (
        hasattr(rows, "with_format") and (getattr(rows, "format", None) or {}).get("type") is None
    )
    return rows.with_format("numpy") if is_unsaid else rows


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class Distilling(_Trainer):
    """Goes before a Trainer in the list of a class's parents."""

    loss_is_scaled_for_ga: bool | None = True

    loss: Loss | None
    temperature: float
    text_weight: float
    teacher_head: TeacherHead | None
    _evaluated: Tensor

    def set_loss(
        self,
        loss: Loss | None,
        temperature: float,
        text_weight: float,
        teacher_head: TeacherHead | None,
    ) -> None:
        """After the trainer's own `__init__`.

        Raises:
            ValueError: the processes would divide a sequence among themselves, or the loss is not that of a head.
        """
        if teacher_head is not None and loss not in (None, "tail_bucket"):
            raise ValueError(
                f"loss is {loss!r}, but with a teacher_head the loss is the KL over the whole vocabulary; leave one of the two out"
            )
        self.loss, self.temperature, self.text_weight = loss, temperature, text_weight
        self.teacher_head = teacher_head and teacher_head.to(self.args.device)
        self._evaluated = torch.zeros(len(SUMS), dtype=torch.float64)
        # What `loss_is_scaled_for_ga` says, in the words of transformers before 5.19.
        self.model_accepts_loss_kwargs = True
        for name in ("cp", "sp"):
            size = getattr(self, f"get_{name}_size", lambda: 1)()
            if size > 1:
                raise ValueError(
                    f"{name}_size is {size}: a sequence would be divided, and its distributions would not; use {name}_size 1"
                )

    def loss_of(self, batch: Mapping[str, Tensor]) -> Loss:
        """The loss that was asked for; else `tail_draws` where the rows have draws, and `tail_bucket` where not."""
        if self.loss is not None or self.teacher_head is not None:
            return self.loss or "tail_bucket"  # of a head, which counts the same positions
        can_draw = "tail_indices" in batch and "logprobs" not in batch and self.temperature == 1
        return "tail_draws" if can_draw else "tail_bucket"

    def get_batch_samples(self, *arguments: Any, **options: Any) -> tuple[list[Any], Any]:
        """The batches of a step, and how many positions count in them: a mean over the processes, as gradients are."""
        samples, _ = super().get_batch_samples(*arguments, **options)
        counts = torch.zeros(2)
        for batch in samples:
            counts = counts + count_positions(batch, loss=self.loss_of(batch)).cpu()
        return samples, self.accelerator.reduce(counts.to(self.args.device), "mean")

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> Any:
        """The distillation, and what a mixture of experts adds to balance them. No `labels`: the model would shift them."""
        outputs = model(**self._model_inputs(inputs))
        weights: dict[str, Any] = {
            "text_weight": self.text_weight,
            "temperature": self.temperature,
            "num_positions": num_items_in_batch,
        }
        if self.teacher_head is not None:
            loss = dense_kl(_logits(outputs), inputs, self.teacher_head, **weights)
        else:
            loss = distillation_loss(_logits(outputs), inputs, loss=self.loss_of(inputs), **weights)
        balance = getattr(outputs, "aux_loss", None)
        if balance is not None:
            student: Any = self.model
            config = student.config.get_text_config()
            in_a_step = (
                1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            )
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * balance / in_a_step
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """As in Trainer; and adds to the sums of the evaluation."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = _logits(model(**self._model_inputs(batch)))
            loss = self.loss_of(batch)
            sums = row_sums(
                logits,
                batch,
                loss=loss,
                temperature=self.temperature,
                teacher_head=self.teacher_head,
            )
        # Without the rows by which the last batches were filled up.
        gathered = self.accelerator.gather_for_metrics(sums)
        self._evaluated = self._evaluated + gathered.sum(0).cpu()
        value = torch.tensor(metrics(sums.sum(0), text_weight=self.text_weight)["loss"])
        value = value.to(logits.device)
        if prediction_loss_only:
            return value, None, None
        return value, logits, batch.get("labels")

    def evaluation_loop(
        self, dataloader: Any, description: str, *arguments: Any, **options: Any
    ) -> Any:
        """As in Trainer; `loss` is the mean over positions, not over batches, and the metrics of `evaluation` stand beside it."""
        self._evaluated = torch.zeros(len(SUMS), dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, *arguments, **options)
        prefix = options.get("metric_key_prefix", "eval")
        found = metrics(self._evaluated, text_weight=self.text_weight)
        reported = {f"{prefix}_{name}": value for name, value in found.items()}
        return output._replace(metrics={**(output.metrics or {}), **reported})

    def _model_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the student is called with. Packed sequences do not see each other if it has `position_ids`, and neither mask nor cache."""
        taken = {"input_ids": batch["input_ids"]}
        if "attention_mask" in batch:
            if self._takes("attention_mask"):
                taken["attention_mask"] = batch["attention_mask"]
        else:
            self._check_packing(batch)
            taken["position_ids"] = batch["position_ids"]
        return taken | ({"use_cache": False} if self._takes("use_cache") else {})

    def _check_packing(self, batch: Mapping[str, Tensor]) -> None:
        attention = str(getattr(getattr(self.model, "config", None), "_attn_implementation", ""))
        if not self._takes("position_ids"):
            raise ValueError(
                f"{type(self.model).__name__} takes no position_ids, without which packed sequences see each other; use packed=False"
            )
        if "flash" in attention and len(batch["input_ids"]) > 1:
            raise ValueError(
                f"{attention} keeps packed sequences apart in batches of one row only, but this one has {len(batch['input_ids'])}; make the "
                "collator without a length, so that it puts all sequences into one row"
            )

    def _takes(self, name: str) -> bool:
        return name in self._parameters or self._takes_anything

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        model: Any = self.model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        return inspect.signature(model.forward).parameters

    @cached_property
    def _takes_anything(self) -> bool:
        """Of a wrapper that hands its arguments on."""
        kinds: Iterable[Any] = (p.kind for p in self._parameters.values())
        is_named = "input_ids" in self._parameters
        return not is_named and inspect.Parameter.VAR_KEYWORD in kinds


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits
