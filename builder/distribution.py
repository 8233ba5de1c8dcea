"""Raw logits of some positions → the statistics that are stored for them, exactly and in bounded memory.

In:   logits_NV, the teacher's raw logits at N positions (float32, bfloat16 or float16), and the ids of the N tokens
      that really follow.
Out:  a Distribution: exact top K (ties by lower id), tail mass, target, log-partition and entropy of each position.

How:  everything comes from a float32 softmax over the whole vocabulary at temperature 1, computed in pieces of a few
      rows that stay in the processor's cache, so that no float32 copy of [N, V] is ever made. The vocabulary is cut
      into blocks. One pass over a row yields each block's maximum m_b, s_b = Σ exp(x − m_b) and
      w_b = Σ (x − m_b) exp(x − m_b). The top K of a row lie in the K blocks with the largest maxima, so only those
      are searched. The tail is the sum of the other blocks and of what the searched blocks hold beyond the
      top K: a sum of positive terms, exact however small it is, where 1 − Σ exp(top K) would cancel.

Cost: about 150 µs a position for V = 49,152 on two cores of an AVX2 machine, 5 % of that teacher's float32 forward
      pass there; `logsumexp` and `topk` alone take 260 µs.

Shape suffixes: N positions, R those of a piece, V vocabulary, K top-k, G blocks, W width of a block, B searched
                blocks, C candidates.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from builder.schema import FLOAT16_MIN

PIECE_BYTES = 2**20
"""Float32 logits worked on at once on a CPU: they and their exponentials stay in the last-level cache."""
CUDA_PIECE_BYTES = 256 * 2**20
"""The same on a GPU, where a piece must fill the device rather than fit a cache."""
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """What is stored of the teacher's distribution at N positions, in stored types."""

    topk_indices: Tensor
    """[N, K] int32."""
    topk_logprobs: Tensor
    """[N, K] float16."""
    tail_logprob: Tensor
    """[N] float16."""
    target_logprob: Tensor
    """[N] float16; NaN where no token follows."""
    logsumexp: Tensor
    """[N] float32; not finite where the logits held NaN or +inf, or nothing but −inf."""
    entropy: Tensor
    """[N] float16, nats."""


def concatenate(parts: list[Distribution]) -> Distribution:
    """One Distribution of all positions of `parts`, in their order."""
    return Distribution(
        **{
            f.name: torch.cat([getattr(part, f.name) for part in parts])
            for f in fields(Distribution)
        }
    )


def capture(logits_NV: Tensor, targets_N: Tensor, *, top_k: int) -> Distribution:
    """The stored statistics of N positions.

    Args:
        logits_NV: raw logits, in any float type, on any device.
        targets_N: id of the token that really follows each position, or −1 where none does.
        top_k: how many of the V entries to keep, 1 to V.

    Returns:
        The statistics on the device of the logits. Positions whose logits hold NaN or +inf, or nothing but
        −inf, have a log-partition that is not finite; the caller must look before it stores anything.
    """
    width = block_width(logits_NV.shape[1], top_k)
    missing = -logits_NV.shape[1] % width
    if missing:
        logits_NV = torch.nn.functional.pad(logits_NV, (0, missing), value=-torch.inf)
    logits_NGW = logits_NV.unflatten(1, (-1, width))
    block_max_NG, block_sum_NG, block_weighted_NG = _block_statistics(logits_NGW)

    row_max_N1 = block_max_NG.amax(-1, keepdim=True)
    # A block of nothing but −inf has s_b = w_b = 0; its shift is bounded so that 0 · −inf cannot make a NaN.
    shift_NG = (block_max_NG - row_max_N1).clamp(min=-1e4)
    scale_NG = shift_NG.exp()
    sum_N1 = (block_sum_NG * scale_NG).sum(-1, keepdim=True)
    weighted_N1 = ((block_weighted_NG + shift_NG * block_sum_NG) * scale_NG).sum(-1, keepdim=True)
    logsumexp_N1 = row_max_N1 + sum_N1.log()

    topk_logits_NK, topk_ids_NK, tail_logit_N = _top_k(
        logits_NGW, block_max_NG, block_sum_NG, top_k
    )
    target_logits_N1 = logits_NV.gather(1, targets_N.clamp(min=0)[:, None]).float()
    target_N = (target_logits_N1 - logsumexp_N1)[:, 0]
    return Distribution(
        topk_indices=topk_ids_NK.int(),
        topk_logprobs=_to_float16(topk_logits_NK - logsumexp_N1),
        tail_logprob=_to_float16(tail_logit_N - logsumexp_N1[:, 0]),
        target_logprob=_to_float16(target_N).masked_fill(targets_N < 0, torch.nan),
        logsumexp=logsumexp_N1[:, 0],
        # H = −Σ p log p = log S − Σ (x − max) exp(x − max) / S, all terms of one sign.
        entropy=_to_float16((sum_N1.log() - weighted_N1 / sum_N1)[:, 0]),
    )


def block_width(vocab_size: int, top_k: int) -> int:
    """Width of a block: the power of two that balances G = V / W maxima against K · W candidates."""
    width = 16
    while width * width * top_k < vocab_size and width < 256:
        width *= 2
    return width


def _block_statistics(logits_NGW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m_b = max x, s_b = Σ exp(x − m_b) and w_b = Σ (x − m_b) exp(x − m_b) of every block, [N, G] each."""
    piece_bytes = CUDA_PIECE_BYTES if logits_NGW.is_cuda else PIECE_BYTES
    rows_per_piece = max(1, piece_bytes // (4 * logits_NGW[0].numel()))
    pieces = []
    for logits_RGW in logits_NGW.split(rows_per_piece):
        logits_RGW = logits_RGW.float()
        max_RG = logits_RGW.amax(-1)
        shifted_RGW = logits_RGW - max_RG.clamp(min=LOWEST)[..., None]
        exp_RGW = shifted_RGW.exp()
        # nansum: where x is −inf, exp is 0 and 0 · −inf adds nothing. A NaN in x shows in the maximum.
        pieces.append((max_RG, exp_RGW.sum(-1), shifted_RGW.mul_(exp_RGW).nansum(-1)))
    maxima, sums, weighted = zip(*pieces, strict=True)
    return torch.cat(maxima), torch.cat(sums), torch.cat(weighted)


def _top_k(
    logits_NGW: Tensor, block_max_NG: Tensor, block_sum_NG: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The K largest logits, their ids, and log Σ exp(x) over everything else."""
    num_rows, num_blocks, width = logits_NGW.shape
    searched = min(top_k, num_blocks)
    blocks_NG = torch.arange(num_blocks, device=logits_NGW.device).expand(num_rows, -1)
    best_blocks_NB = blocks_NG.gather(1, _rank(block_max_NG, blocks_NG).topk(searched).indices)

    row_starts_N1 = torch.arange(num_rows, device=logits_NGW.device)[:, None] * num_blocks
    candidates_NC = logits_NGW.flatten(0, 1)[best_blocks_NB + row_starts_N1].flatten(1).float()
    offsets_W = torch.arange(width, device=logits_NGW.device)
    ids_NC = (best_blocks_NB[..., None] * width + offsets_W).flatten(1)

    picked_NK = _rank(candidates_NC, ids_NC).topk(top_k).indices
    topk_logits_NK = candidates_NC.gather(1, picked_NK)
    topk_ids_NK = ids_NC.gather(1, picked_NK)

    # The rest of the searched blocks and all other blocks, shifted by their own maximum: no tail underflows.
    beyond_NC = candidates_NC.scatter(1, picked_NK, -torch.inf)
    other_max_NG = block_max_NG.scatter(1, best_blocks_NB, -torch.inf)
    tail_max_N1 = torch.maximum(
        beyond_NC.amax(-1, keepdim=True), other_max_NG.amax(-1, keepdim=True)
    ).clamp(min=LOWEST)
    tail_sum_N = (beyond_NC - tail_max_N1).exp().sum(-1)
    tail_sum_N = tail_sum_N + (block_sum_NG * (other_max_NG - tail_max_N1).exp()).sum(-1)
    return topk_logits_NK, topk_ids_NK, tail_max_N1[:, 0] + tail_sum_N.log()


def _rank(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that order float32 values, equal ones by lower id: no two keys are equal, so top-k is unique.

    The bits of a float32 order like an integer once those of negative numbers are flipped; they become the
    upper half of the key, and the complement of the id the lower one.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes −0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFF_FFFF)
    return (ordered.long() << 32) | (0xFFFF_FFFF - ids)


def _to_float16(values: Tensor) -> Tensor:
    return values.clamp(min=FLOAT16_MIN).half()
