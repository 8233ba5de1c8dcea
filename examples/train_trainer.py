"""Train a small Llama on a logit dataset with the Trainer of transformers (which needs `pip install accelerate`).

    python examples/train_trainer.py out/smollm2-135m-python-docs student/ --steps 200

All that is new is `DistillationTrainer`: where batches come from, and what the loss is. `KeepPlace` is for runs that must go on where
they were stopped (--resume): the place in the data belongs to a checkpoint, as the weights do.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from logit_dataset import distillation_loss, load_logits


class DistillationTrainer(Trainer):
    """A Trainer that takes ready batches, and learns from the distributions in them."""

    loss_is_scaled_for_ga = True  # by the positions of all batches over which gradients accumulate

    def __init__(self, *, batches: Any, loss: str, text_weight: float, **options: Any) -> None:
        """`loss` and `text_weight` are those of `distillation_loss`, all else is as in Trainer; `max_steps` says how long."""
        super().__init__(**options)
        self.batches, self.loss, self.text_weight = batches, loss, text_weight

    def get_train_dataloader(self) -> Iterator[Any]:
        """Batches as they are, read ahead and of this process, without end: at the end of an epoch, which is at another step in each
        process, Trainer would leave the gradients of a half accumulated step to the next one, and processes would wait for each other."""
        while True:
            yield from self.batches

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        """The batches of a step, and the number of positions in them that count: a mean over the processes, as gradients are."""
        samples, _ = super().get_batch_samples(*arguments)
        count = torch.tensor(sum(float(batch["mask"].sum()) for batch in samples))
        return samples, self.accelerator.reduce(count.to(self.args.device), "mean")

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """No `labels`, which the model would shift. Packed sequences do not see each other if the model has `position_ids`, and
        neither a mask nor a cache."""
        outputs = model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        )
        loss = distillation_loss(
            outputs.logits,
            inputs,
            loss=self.loss,
            text_weight=self.text_weight,
            num_positions=num_items_in_batch,
        )
        return (loss, outputs) if return_outputs else loss


class KeepPlace(TrainerCallback):
    """Every process writes its place in the data into each checkpoint, and a run that is resumed begins there."""

    def __init__(self, batches: Any) -> None:
        """`batches` are those of the trainer, whose arguments must say `ignore_data_skip=True`."""
        self.batches = batches

    def on_save(self, args: TrainingArguments, state: TrainerState, _: Any, **__: Any) -> None:
        """The place after all batches of this step."""
        self._file(args, state).write_text(json.dumps(self.batches.state_dict()))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, _: Any, **__: Any
    ) -> None:
        """Whether a run is resumed says its step."""
        if state.global_step:
            self.batches.load_state_dict(json.loads(self._file(args, state).read_text()))

    def _file(self, args: TrainingArguments, state: TrainerState) -> Path:
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        return checkpoint / f"batches-{args.process_index}.json"


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train; returns the logged losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="directory, or name on the Hub")
    parser.add_argument("output", help="directory for the student")
    parser.add_argument("--loss", default="tail_bucket", help="see logit_dataset/divergences.py")
    parser.add_argument("--text-weight", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in OUTPUT")
    args = parser.parse_args(arguments)

    options = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=2e-3,
        logging_steps=max(1, args.steps // 10),
        save_steps=args.save_every,
        save_total_limit=2,
        ignore_data_skip=True,
        report_to=[],
        disable_tqdm=True,
    )
    data = load_logits(args.dataset)
    batches = data.batches(
        batch_size=4,
        length=args.length,
        packed=True,
        split_long=True,
        rank=options.process_index,
        world_size=options.world_size,
    )
    config = LlamaConfig(
        vocab_size=data.vocab_size,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=data.manifest["teacher"]["eos_token_id"],
    )
    trainer = DistillationTrainer(
        model=LlamaForCausalLM(config),
        args=options,
        callbacks=[KeepPlace(batches)],
        batches=batches,
        loss=args.loss,
        text_weight=args.text_weight,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
