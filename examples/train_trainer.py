"""Train a small Llama on a logit dataset with the Trainer of transformers (which needs `pip install accelerate`).

    python examples/train_trainer.py out/smollm2-135m-python-docs student/ --steps 200

All that is new is `DistillationTrainer`: where batches come from, and what the loss is.
"""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from builder.student import distillation_loss, load_logits


class DistillationTrainer(Trainer):
    """A Trainer that takes ready batches, and learns from the distributions in them."""

    def __init__(
        self, *, batches: Iterable[Any], kind: str, text_weight: float, **options: Any
    ) -> None:
        """`kind` and `text_weight` are those of `distillation_loss`, all else is as in Trainer."""
        super().__init__(**options)
        self.batches, self.kind, self.text_weight = batches, kind, text_weight

    def get_train_dataloader(self) -> Any:
        """Batches as they are: they know their process's share, and are read ahead."""
        return self.batches

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """No `labels`, which the model would shift; and no mask: by `position_ids` alone it separates packed sequences."""
        outputs = model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        )
        loss = distillation_loss(
            outputs.logits, inputs, kind=self.kind, text_weight=self.text_weight
        )
        return (loss, outputs) if return_outputs else loss


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train; returns the logged losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="directory, or name on the Hub")
    parser.add_argument("output", help="directory for the student")
    parser.add_argument("--kind", default="tail_bucket", help="see builder/student/divergences.py")
    parser.add_argument("--text-weight", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args(arguments)

    options = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        learning_rate=2e-3,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
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
        batches=batches,
        kind=args.kind,
        text_weight=args.text_weight,
    )
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
