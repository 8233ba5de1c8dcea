"""The statistics of a top K on a GPU, with one read of the logits (Triton). `distribution` is the reference, and the way elsewhere.

In:   raw logits [N, V] in any float type, on a GPU.
Out:  the columns of `distribution.capture` with a top K of at most MAX_TOP_K and at most MAX_DRAWS draws.

How:  four launches, one program a row in each.

      scan    reads the row once. Keeps the maximum and Σ exp of each block of 64 entries, and over the row the online maximum, Σ exp,
              Σ (x − max) exp and, for other temperatures, Σ exp(x / T) (Milakov and Gimelshein 2018, Online normalizer calculation
              for softmax).
      select  finds the K blocks with the largest (maximum, lower id), among which the K largest entries are. The K-th largest is
              found bit by bit, by counting, so that ties, however many, need no other way.
      pick    opens these blocks, finds their K largest entries in the same way, and leaves in the blocks' maxima and sums only what is
              below those: now the blocks are the tail, a sum of positive terms.
      finish  sorts the K entries, sums the tail, and draws from it as `draws` does: a block, in the block an entry, by sums in float64.

Cost: bytes moved a row: V · itemsize read once, 8 · V / 64 written and read three times, 64 · itemsize for each of the K blocks and of
      the draws. Not measured yet; the prototype, which sorted more, took 0.20 µs a row at V = 49,152 on an H100 and 0.57 at 152,064.

Shape suffixes: N positions, V vocabulary, B blocks, K top-k, M draws. With P, padded to a power of two.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from logit_dataset.schema import FLOAT16_MIN, temperature_column

MAX_TOP_K, MAX_DRAWS = 128, 64
"""Beyond these, registers would be spilled."""
BLOCK = 64
TILE = 4096
"""Entries that `scan` holds at once."""

_BLOCK = tl.constexpr(BLOCK)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(FLOAT16_MIN)
_NOTHING = tl.constexpr(-(2**31))
"""A key below that of any float."""
_BELOW_ONE = tl.constexpr(1 - 2.0**-33)
"""As `draws.BELOW_ONE`."""


def capture_rows(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    top_k: int,
    uniforms_NM: Tensor | None = None,
    draw_logprobs: bool = True,
    temperatures: Sequence[float] = (),
) -> dict[str, Tensor]:
    """As `distribution.capture` of one piece of logits.

    Args:
        logits_NV: raw logits.
        targets_N: ids of the tokens that follow, or −1.
        top_k: 1 to MAX_TOP_K.
        uniforms_NM: float64; M up to MAX_DRAWS.
        draw_logprobs: whether the log-probabilities of draws are wanted.
        temperatures: other ones at which the logsumexp is wanted.
    """
    rows, vocab_size = logits_NV.shape
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    targets_N = targets_N.contiguous()
    uniforms_NM = None if uniforms_NM is None else uniforms_NM.contiguous()
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    opened = min(top_k, num_blocks)
    draws = 0 if uniforms_NM is None else uniforms_NM.shape[1]
    float32: dict[str, Any] = {"dtype": torch.float32, "device": logits_NV.device}
    int32: dict[str, Any] = {"dtype": torch.int32, "device": logits_NV.device}
    float16: dict[str, Any] = {"dtype": torch.float16, "device": logits_NV.device}
    max_NB = torch.empty(rows, num_blocks, **float32)
    sum_NB = torch.empty_like(max_NB)
    row_N3 = torch.empty(rows, 3, **float32)
    chosen_NK = torch.empty(rows, opened, **int32)
    keys_NK = torch.empty(rows, top_k, dtype=torch.int64, device=logits_NV.device)
    inverse_T = torch.tensor([1 / t for t in temperatures] or [1.0], **float32)
    logsumexp_TN = torch.empty(len(temperatures), rows, **float32)
    found = {
        "topk_indices": torch.empty(rows, top_k, **int32),
        "topk_logprobs": torch.empty(rows, top_k, **float16),
        "tail_logprob": torch.empty(rows, **float16),
        "target_logprob": torch.empty(rows, **float16),
        "logsumexp": torch.empty(rows, **float32),
        "entropy": torch.empty(rows, **float16),
    }
    drawn_NM = torch.empty(rows, draws, **int32)
    drawn_logprobs_NM = torch.empty(rows, draws, **float16) if draw_logprobs else None
    blocks_P = triton.next_power_of_2(num_blocks)
    warps = 8 if blocks_P > 1024 else 4
    if rows:
        grid, stride = (rows,), logits_NV.stride(0)
        _scan[grid](
            *(logits_NV, stride, max_NB, sum_NB, row_N3, inverse_T, logsumexp_TN),
            *(rows, vocab_size, num_blocks, len(temperatures)),
            TP=triton.next_power_of_2(max(1, len(temperatures))),
            TILE=min(TILE, triton.next_power_of_2(max(BLOCK, vocab_size))),
        )
        _select[grid](max_NB, chosen_NK, num_blocks, opened, BP=blocks_P, num_warps=warps)
        _pick[grid](
            *(logits_NV, stride, max_NB, sum_NB, chosen_NK, keys_NK, vocab_size, num_blocks),
            *(opened, top_k),
            KP=triton.next_power_of_2(opened),
            num_warps=8,
        )
        _finish[grid](
            *(logits_NV, stride, max_NB, sum_NB, row_N3, keys_NK, targets_N, uniforms_NM),
            *(found["topk_indices"], found["topk_logprobs"], found["tail_logprob"]),
            *(found["target_logprob"], found["logsumexp"], found["entropy"]),
            *(drawn_NM, drawn_logprobs_NM, vocab_size, num_blocks, top_k, draws),
            BP=blocks_P,
            KP=triton.next_power_of_2(max(2, top_k)),
            MP=triton.next_power_of_2(max(1, draws)),
            DRAW_LOGPROBS=draw_logprobs,
            num_warps=warps,
        )
    for temperature, logsumexp_N in zip(temperatures, logsumexp_TN, strict=True):
        found[temperature_column(temperature).name] = logsumexp_N
    if draws:
        found["tail_indices"] = drawn_NM
        if drawn_logprobs_NM is not None:
            found["tail_logprobs"] = drawn_logprobs_NM
    return found


@triton.jit
def _finite_or_zero(x):
    """−inf as 0: a maximum of nothing, from which nothing is to be subtracted."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _key(x):
    """int32 that orders float32 values, −0 as 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _largest(keys, in_use, count):
    """Which `count` of the keys are the largest, of equal ones the first. Keys that are not in use are below all others."""
    threshold = tl.full((), _NOTHING, tl.int64)
    bit = tl.full((), 2**31, tl.int64)
    for _ in range(32):
        higher = threshold + bit
        enough = tl.sum((keys >= higher.to(tl.int32)).to(tl.int32), 0) >= count
        threshold = tl.where(enough, higher, threshold)
        bit = bit >> 1
    lowest = threshold.to(tl.int32)
    above = keys > lowest
    equal = (keys == lowest) & in_use
    missing = count - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))


@triton.jit
def _scan(
    X,
    stride,
    MAX,
    SUM,
    ROW,
    INVERSE,
    LOGSUMEXP_T,
    rows,
    V: tl.constexpr,
    NB: tl.constexpr,
    NT: tl.constexpr,
    TP: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = TILE // _BLOCK
    t = tl.arange(0, TP)
    inverse_T = tl.load(INVERSE + t, mask=t < NT, other=1.0) * _LOG2E
    sum_T = tl.zeros((TP,), tl.float32)
    peak = -float("inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, V, TILE):
        entry = start + tl.arange(0, TILE)
        x = tl.load(X + row * stride + entry, mask=entry < V, other=-float("inf")).to(tl.float32)
        x_BE = tl.reshape(x, (blocks, _BLOCK))
        max_B = tl.max(x_BE, 1)
        shifted_BE = x_BE - _finite_or_zero(max_B)[:, None]
        exp_BE = tl.exp2(shifted_BE * _LOG2E)
        sum_B = tl.sum(exp_BE, 1)
        # Where exp is 0, x may be −inf, and 0 · −inf adds nothing.
        weighted_B = tl.sum(tl.where(exp_BE == 0.0, 0.0, shifted_BE * exp_BE), 1)
        block = start // _BLOCK + tl.arange(0, blocks)
        tl.store(MAX + row * NB + block, max_B, mask=block < NB)
        tl.store(SUM + row * NB + block, sum_B, mask=block < NB)
        higher = tl.maximum(peak, tl.max(max_B, 0))
        safe = _finite_or_zero(higher)
        scale = tl.exp2((peak - safe) * _LOG2E)
        share_B = tl.exp2((max_B - safe) * _LOG2E)
        moved = tl.where(scale == 0.0, 0.0, scale * (weighted + (peak - safe) * total))
        moved_B = tl.where(share_B == 0.0, 0.0, share_B * (weighted_B + (max_B - safe) * sum_B))
        weighted = moved + tl.sum(moved_B, 0)
        total = total * scale + tl.sum(sum_B * share_B, 0)
        if NT > 0:
            part_T = tl.sum(tl.exp2((x[None, :] - safe) * inverse_T[:, None]), 1)
            sum_T = sum_T * tl.exp2((peak - safe) * inverse_T) + part_T
        peak = higher
    tl.store(ROW + row * 3, peak)
    tl.store(ROW + row * 3 + 1, total)
    tl.store(ROW + row * 3 + 2, weighted)
    if NT > 0:
        logsumexp_T = (peak * inverse_T + tl.log2(sum_T)) * _LN2
        tl.store(LOGSUMEXP_T + t.to(tl.int64) * rows + row, logsumexp_T, mask=t < NT)


@triton.jit
def _select(MAX, CHOSEN, NB: tl.constexpr, OPENED: tl.constexpr, BP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BP)
    max_B = tl.load(MAX + row * NB + block, mask=block < NB, other=-float("inf"))
    keys_B = tl.where(block < NB, _key(max_B), _NOTHING)
    chosen_B = _largest(keys_B, block < NB, OPENED)
    place_B = tl.cumsum(chosen_B.to(tl.int32), 0) - 1
    tl.store(CHOSEN + row * OPENED + place_B, block, mask=chosen_B & (place_B < OPENED))


@triton.jit
def _pick(
    X,
    stride,
    MAX,
    SUM,
    CHOSEN,
    KEYS,
    V: tl.constexpr,
    NB: tl.constexpr,
    OPENED: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    block_K = tl.load(CHOSEN + row * OPENED + k, mask=k < OPENED, other=0)
    id_KE = block_K[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    real_KE = (k < OPENED)[:, None] & (id_KE < V)
    x_KE = tl.load(X + row * stride + id_KE, mask=real_KE, other=-float("inf")).to(tl.float32)
    ids = tl.reshape(id_KE, (KP * _BLOCK,))
    real = tl.reshape(real_KE, (KP * _BLOCK,))
    # Blocks are in the order of their ids, so entries are, too.
    keys = tl.where(real, _key(tl.reshape(x_KE, (KP * _BLOCK,))), _NOTHING)
    top = _largest(keys, real, K)
    place = tl.cumsum(top.to(tl.int32), 0) - 1
    whole = (keys.to(tl.int64) << 32) | (ids.to(tl.int64) ^ 0xFFFFFFFF)
    tl.store(KEYS + row * K + place, whole, mask=top & (place < K))

    below_KE = real_KE & (tl.reshape(top, (KP, _BLOCK)) == 0)
    x_KE = tl.where(below_KE, x_KE, -float("inf"))
    max_K = tl.max(x_KE, 1)
    sum_K = tl.sum(tl.exp2((x_KE - _finite_or_zero(max_K)[:, None]) * _LOG2E), 1)
    tl.store(MAX + row * NB + block_K, max_K, mask=k < OPENED)
    tl.store(SUM + row * NB + block_K, sum_K, mask=k < OPENED)


@triton.jit
def _value_of(keys):
    """The float32 of whole keys."""
    bits = (keys >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _half(x):
    """float16, nothing below its range; a NaN stays one."""
    return tl.where(x < _LOWEST, _LOWEST, x).to(tl.float16)


@triton.jit
def _finish(
    X,
    stride,
    MAX,
    SUM,
    ROW,
    KEYS,
    TARGETS,
    UNIFORMS,
    TOP_IDS,
    TOP_LOGPROBS,
    TAIL,
    TARGET_LOGPROB,
    LOGSUMEXP,
    ENTROPY,
    DRAWN,
    DRAWN_LOGPROBS,
    V: tl.constexpr,
    NB: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    BP: tl.constexpr,
    KP: tl.constexpr,
    MP: tl.constexpr,
    DRAW_LOGPROBS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    peak = tl.load(ROW + row * 3)
    total = tl.load(ROW + row * 3 + 1)
    log_total = tl.log2(total) * _LN2
    logsumexp = peak + log_total
    tl.store(LOGSUMEXP + row, logsumexp)
    entropy = log_total - tl.load(ROW + row * 3 + 2) / total
    tl.store(ENTROPY + row, _half(entropy))

    target = tl.load(TARGETS + row)
    target_logit = tl.load(X + row * stride + tl.maximum(target, 0)).to(tl.float32)
    target_logprob = tl.where(target < 0, float("nan"), target_logit - logsumexp)
    tl.store(TARGET_LOGPROB + row, _half(target_logprob))

    k = tl.arange(0, KP)
    keys = tl.load(KEYS + row * K + k, mask=k < K, other=-(2**63))
    keys = tl.sort(keys, descending=True)
    top_ids = (keys ^ 0xFFFFFFFF) & 0xFFFFFFFF
    tl.store(TOP_IDS + row * K + k, top_ids.to(tl.int32), mask=k < K)
    tl.store(TOP_LOGPROBS + row * K + k, _half(_value_of(keys) - logsumexp), mask=k < K)
    kth = tl.min(tl.where(k < K, keys, 2**63 - 1), 0)

    b = tl.arange(0, BP)
    max_B = tl.load(MAX + row * NB + b, mask=b < NB, other=-float("inf"))
    sum_B = tl.load(SUM + row * NB + b, mask=b < NB, other=0.0)
    tail_peak = tl.max(max_B, 0)
    share_B = tl.exp2((max_B - _finite_or_zero(tail_peak)) * _LOG2E)
    weight_B = sum_B.to(tl.float64) * share_B.to(tl.float64)
    tail_total = tl.sum(weight_B, 0)
    tail = tail_peak + tl.log2(tail_total.to(tl.float32)) * _LN2
    tl.store(TAIL + row, _half(tail - logsumexp))

    if M > 0:
        m = tl.arange(0, MP)
        uniform_M = tl.load(UNIFORMS + row * M + m, mask=m < M, other=0.0)
        uniform_M = tl.minimum(tl.maximum(uniform_M, 0.0), _BELOW_ONE)
        cumulated_B = tl.cumsum(weight_B, 0)
        goal_M = uniform_M * tl.max(cumulated_B, 0)
        block_M = tl.zeros((MP,), tl.int32)
        before_M = tl.zeros((MP,), tl.float64)
        for j in range(M):
            goal = tl.sum(tl.where(m == j, goal_M, 0.0), 0)
            is_below_B = cumulated_B <= goal
            block_M = tl.where(m == j, tl.sum(is_below_B.to(tl.int32), 0), block_M)
            before = tl.max(tl.where(is_below_B, cumulated_B, 0.0), 0)
            before_M = tl.where(m == j, before, before_M)
        block_M = tl.minimum(block_M, NB - 1)
        max_M = tl.load(MAX + row * NB + block_M)
        share_M = tl.exp2((max_M - _finite_or_zero(tail_peak)) * _LOG2E).to(tl.float64)
        weight_M = tl.load(SUM + row * NB + block_M).to(tl.float64) * share_M
        within_M = (goal_M - before_M) / weight_M
        id_ME = block_M[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        real_ME = (m < M)[:, None] & (id_ME < V)
        x_ME = tl.load(X + row * stride + id_ME, mask=real_ME, other=-float("inf"))
        x_ME = x_ME.to(tl.float32)
        whole_ME = (_key(x_ME).to(tl.int64) << 32) | (id_ME.to(tl.int64) ^ 0xFFFFFFFF)
        x_ME = tl.where(real_ME & (whole_ME < kth), x_ME, -float("inf"))
        exp_ME = tl.exp2((x_ME - _finite_or_zero(max_M)[:, None]) * _LOG2E).to(tl.float64)
        inner_ME = tl.cumsum(exp_ME, 1)
        within_M = tl.minimum(tl.maximum(within_M, 0.0), _BELOW_ONE)
        goal_M = within_M * tl.max(inner_ME, 1)
        entry_M = tl.sum((inner_ME <= goal_M[:, None]).to(tl.int32), 1)
        drawn_M = block_M * _BLOCK + tl.minimum(entry_M, _BLOCK - 1)
        has_tail = tail_peak > -float("inf")
        last_id = ((kth ^ 0xFFFFFFFF) & 0xFFFFFFFF).to(tl.int32)
        drawn_M = tl.where(has_tail, tl.minimum(drawn_M, V - 1), last_id)
        tl.store(DRAWN + row * M + m, drawn_M, mask=m < M)
        if DRAW_LOGPROBS:
            logit_M = tl.load(X + row * stride + drawn_M, mask=m < M, other=0.0).to(tl.float32)
            logprob_M = tl.where(has_tail, logit_M - logsumexp, _LOWEST)
            tl.store(DRAWN_LOGPROBS + row * M + m, _half(logprob_M), mask=m < M)
