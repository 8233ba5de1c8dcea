"""Train a student of under a million parameters on a logit dataset, in plain PyTorch.

    python examples/train_plain.py out/smollm2-135m-python-docs --steps 400

Its vocabulary is the most frequent ids of the teacher and one for all others. With --checkpoint it can be killed at any moment, and goes
on at the exact next batch of the last checkpoint.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logit_dataset import FrequentTokens, distillation_loss_from_hidden, load_logits


class Block(nn.Module):
    """Attention and a two-layer network, each after a norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        """Weights for hidden states of `width` numbers."""
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden_BTD: Tensor, allowed_B1TT: Tensor) -> Tensor:
        """One step of the residual stream."""
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](hidden_BTD)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed_B1TT)
        hidden_BTD = hidden_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden_BTD + self.network(self.norms[1](hidden_BTD))


class Student(nn.Module):
    """Ids → last hidden states. `head` makes logits of them; its weights are those of the embedding."""

    def __init__(self, vocab_size: int, length: int, *, width: int, num_layers: int) -> None:
        """A student for sequences of up to `length` tokens."""
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, 4) for _ in range(num_layers)])
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A position attends to those before it in its own sequence, not to what is packed beside it."""
        sequence = batch["sequence_ids"]
        allowed = (sequence[:, :, None] == sequence[:, None, :]).tril()
        hidden_BTD = self.tokens(batch["input_ids"]) + self.positions(batch["position_ids"])
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD, allowed[:, None])
        return self.norm(hidden_BTD)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train; returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="directory, or name on the Hub")
    parser.add_argument("--loss", default="residual", help="see logit_dataset/divergences.py")
    parser.add_argument("--vocabulary", type=int, default=4096, help="ids that keep a place")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--every", type=int, default=50, help="steps from report to report")
    parser.add_argument("--checkpoint", type=Path, help="file to resume from, written at reports")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_logits(args.dataset)
    data = data.project(FrequentTokens.of(data, args.vocabulary))
    batches = data.batches(batch_size=4, length=args.length, packed=True, split_long=True)
    student = Student(data.vocab_size, args.length, width=96, num_layers=3).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    print(
        f"{sum(p.numel() for p in student.parameters()):,} parameters, {data.num_tokens:,} tokens"
    )
    if args.checkpoint and args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        batches.load_state_dict(saved["batches"])

    losses: list[float] = []
    while len(losses) < args.steps:
        for batch in batches:  # one epoch, or what is left of it
            batch = {name: values.to(device) for name, values in batch.items()}
            hidden_BTD = student(batch)
            loss = distillation_loss_from_hidden(hidden_BTD, student.head, batch, loss=args.loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            is_last = len(losses) == args.steps
            if is_last or len(losses) % args.every == 0:
                print(f"step {len(losses):>5}  {args.loss} {losses[-1]:.3f} nats")
                if args.checkpoint:
                    save(args.checkpoint, student=student, optimizer=optimizer, batches=batches)
            if is_last:
                break
    return losses


def save(path: Path, **parts: Any) -> None:
    """The states of all parts, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    torch.save({name: part.state_dict() for name, part in parts.items()}, partial)
    partial.replace(path)


if __name__ == "__main__":
    main()
