"""The student: a Llama of a million parameters with the teacher's most frequent ids for a vocabulary, and what it writes.

Embedding and head are tied. With 2,049 ids, the small one has 0.87M parameters, three tenths of them the embedding; the larger one 5.4M.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from examples.experiment.arms import Batch


@dataclass(frozen=True, slots=True)
class Size:
    """Of a student."""

    width: int
    layers: int
    heads: int
    inner_width: int


SIZES = {"small": Size(128, 3, 4, 352), "larger": Size(256, 6, 8, 704)}


def make_student(
    vocab_size: int, *, length: int, seed: int, size: str = "small"
) -> LlamaForCausalLM:
    """New weights, a function of size and seed alone."""
    chosen = SIZES[size]
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=chosen.width,
            intermediate_size=chosen.inner_width,
            num_hidden_layers=chosen.layers,
            num_attention_heads=chosen.heads,
            num_key_value_heads=chosen.heads,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def logits_of(student: LlamaForCausalLM, batch: Batch) -> Tensor:
    """[B, T, V]. Without a mask and with positions, a packed sequence does not see its neighbours."""
    ids, positions = batch["input_ids"].long(), batch["position_ids"].long()
    logits: Tensor = student(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits


@torch.inference_mode()
def write_on(
    student: LlamaForCausalLM,
    prompt: Sequence[int],
    *,
    num_tokens: int,
    seed: int,
    temperature: float,
) -> list[int]:
    """Ids drawn one by one after the prompt; never `other` (the last id), which stands for no text."""
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(num_tokens):
        logits_V = student(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :-1]
        probs_V = (logits_V / temperature).softmax(-1)
        ids.append(int(torch.multinomial(probs_V, 1, generator=generator)))
    return ids[len(prompt) :]
