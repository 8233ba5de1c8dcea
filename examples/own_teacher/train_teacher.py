"""Train the model of my_teacher.py on the documentation that every Python brings.

    python examples/own_teacher/train_teacher.py --output out/own_teacher

A step takes about a second of one core, so all of it a minute or two. It writes what `recipe.toml` names (model.pt, tokenizer.json, corpus.jsonl), and copies the recipe and my_teacher.py beside it.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from my_teacher import VOCAB_SIZE, SmallModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BATCH = 8


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with as many ids as the model has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, and return the loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120, help="of 2,048 tokens")
    options = parser.parse_args(arguments)

    texts = [text for _, text in sorted(topics.items())]
    tokenizer = make_tokenizer(texts)
    ids_N = torch.tensor([i for text in texts for i in [*tokenizer.encode(text).ids, 0]])

    torch.manual_seed(0)
    model, length = SmallModel(), SmallModel.max_length
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    losses = []
    for step in range(options.steps):
        starts_B = torch.randint(len(ids_N) - length, (BATCH,))
        ids_BT = torch.stack([ids_N[start : start + length + 1] for start in starts_B])
        logits_BTV = model(ids_BT[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {losses[-1]:.3f}", flush=True)

    options.output.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), options.output / "model.pt")
    tokenizer.save(str(options.output / "tokenizer.json"))
    with (options.output / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for name, text in sorted(topics.items()):
            file.write(json.dumps({"id": name, "text": text}) + "\n")
    for name in ("my_teacher.py", "recipe.toml"):
        shutil.copy(Path(__file__).with_name(name), options.output)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {options.output}")
    return losses


if __name__ == "__main__":
    main()
