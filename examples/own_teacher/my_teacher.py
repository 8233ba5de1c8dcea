"""A language model of a million parameters in plain PyTorch, and the function by which `logit-dataset` loads it.

This file is all that the builder knows of the model. It is run where a recipe of yours names it (`teacher.python`), or you do
(`logit-dataset verify … --teacher my_teacher.py`).
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

VOCAB_SIZE, WIDTH, NUM_LAYERS, NUM_HEADS = 2_000, 128, 4, 4


class Block(nn.Module):
    """Attention and a two-layer network, each after a norm."""

    def __init__(self) -> None:
        """Weights of one layer."""
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.network = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """One step of the residual stream. A position attends to itself and those before it."""
        q, k, v = (
            part.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](hidden_BTD)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden_BTD = hidden_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden_BTD + self.network(self.norms[1](hidden_BTD))


class SmallModel(nn.Module):
    """Ids [B, T] → logits [B, T, V]."""

    max_length = 256
    """The longest sequence; `logit-dataset` reads it."""

    def __init__(self) -> None:
        """A model without training."""
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.positions = nn.Embedding(self.max_length, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(NUM_LAYERS)])
        self.norm = nn.RMSNorm(WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Position t says what follows token t. The head's weights are those of the embedding."""
        places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        hidden_BTD = self.tokens(ids_BT) + self.positions(places_T)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        logits_BTV: Tensor = self.norm(hidden_BTD) @ self.tokens.weight.T
        return logits_BTV


def load_teacher(weights: Path, tokenizer: Path) -> tuple[SmallModel, Tokenizer]:
    """What `logit-dataset` calls, with the paths that the recipe lists as `teacher.weights`."""
    model = SmallModel()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model, Tokenizer.from_file(str(tokenizer))
