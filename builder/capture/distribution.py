"""Raw logits of some positions → the statistics that are stored for them, exactly and in bounded memory.

In:   pieces of logits_NV, the teacher's raw logits (float32, bfloat16 or float16), and the ids of the tokens that really
      follow.
Out:  a Distribution: exact top K (ties by lower id), tail mass, target, logsumexp and entropy of each position.

How:  everything comes from a float32 softmax over the whole vocabulary at temperature 1, computed for a few rows at a time
      that stay in the processor's cache, so that no float32 copy of [N, V] is ever made.

      Top K.  A row is cut into blocks of WIDE entries, and these into blocks of NARROW ones. The K largest entries lie in
      the K blocks with the largest maxima, and there in the K narrow blocks with the largest maxima: only those
      K · NARROW candidates are sorted. A block is ranked by (maximum, lower id), as an entry is, so ties stay exact.

      The tail.  In a row without its top K, one softmax p gives Σ exp(x − max x) = 1 / max p and the mean Σ p x. So the
      tail is a sum of positive terms relative to its own largest, exact however small it is, where 1 − Σ exp(top K) would
      cancel or underflow. Draws are from the same p: see `draws`.

      On a GPU, `kernels` computes the same with one read of the logits, up to a K of 128; this way is its reference.

Cost: about 60 µs a position for V = 49,152 on two cores, where that teacher's forward pass takes 1,200 µs in bfloat16;
      `logsumexp` and `topk` alone, as one would write them, take 130 to 190 µs.

Shape suffixes: N positions, R those of a piece, V vocabulary (P padded to whole blocks), K top-k, M draws, B blocks, C candidates.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from builder.capture.draws import draw
from logit_dataset.schema import FLOAT16_MIN, temperature_column

WIDE, NARROW = 64, 8
CPU_WORKSPACE_BYTES = 16 * 2**20
"""Float32 logits worked on at once: small enough for a last-level cache, large enough to hide the cost of a call."""
CUDA_WORKSPACE_BYTES = 128 * 2**20
"""The same on a GPU, where a piece must fill the device rather than fit a cache."""


Distribution = dict[str, Tensor]
"""What is stored of the teacher's distribution at N positions: name of a column → [N] or [N, values a token], in its stored type.

Always there: target_logprob, logsumexp, entropy. With a top K: topk_indices, topk_logprobs, tail_logprob. The others as asked for.
Where a dataset keeps completions only, columns of several values a token hold positions in the loss mask only from `pipeline` on.
"""


def concatenate(parts: list[Distribution]) -> Distribution:
    """One Distribution of all positions of `parts`, in their order."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.inference_mode()
def capture(
    pieces: Iterable[Tensor],
    targets_N: Tensor,
    *,
    top_k: int | Literal["all"],
    uniforms_NM: Tensor | None = None,
    temperatures: Sequence[float] = (),
) -> Distribution:
    """The stored statistics of N positions.

    Args:
        pieces: raw logits [n, V] of consecutive positions, in any float type, on one device; together N of them.
        targets_N: id of the token that really follows each position, or −1 where none does; on the same device.
        top_k: how many of the V entries to keep, 1 to V, or all of them, in the order of their ids.
        uniforms_NM: numbers from `draws.uniforms`, on the same device, where M tokens are to be drawn from the tail.
        temperatures: other ones at which the logsumexp is wanted.

    Returns:
        The statistics on the device of the logits. Positions whose logits hold NaN or +inf, or nothing but
        −inf, have a logsumexp that is not finite; the caller must look before it stores anything.
    """
    parts: list[Distribution] = []
    workspace = None
    start = 0
    for logits_NV in pieces:
        if _has_kernels(logits_NV.device, top_k, uniforms_NM):
            from builder.capture import kernels

            rows = slice(start, start + len(logits_NV))
            found = kernels.capture_rows(
                logits_NV,
                targets_N[rows],
                top_k=int(top_k),
                uniforms_NM=None if uniforms_NM is None else uniforms_NM[rows],
                temperatures=temperatures,
            )
            parts.append(found)
            start = rows.stop
            continue
        if workspace is None:
            workspace = _Workspace(logits_NV.shape[1], logits_NV.device)
        for logits_RV in logits_NV.split(workspace.num_rows):
            rows = slice(start, start + len(logits_RV))
            x_RP, room_RP = workspace.load(logits_RV)
            found = {
                temperature_column(t).name: _logsumexp_at(t, x_RP, room_RP) for t in temperatures
            }
            if top_k == "all":
                found |= _capture_all(logits_RV, targets_N[rows], x_RP, room_RP)
            else:
                uniforms_RM = None if uniforms_NM is None else uniforms_NM[rows]
                found |= _capture_rows(
                    logits_RV, targets_N[rows], top_k, uniforms_RM, x_RP, room_RP
                )
            parts.append(found)
            start = rows.stop
    assert start == len(targets_N), f"{start} rows of logits for {len(targets_N)} positions"
    return concatenate(parts)


def _has_kernels(
    device: torch.device, top_k: int | Literal["all"], uniforms_NM: Tensor | None
) -> bool:
    """Whether `kernels` computes this: on a GPU with Triton, up to the sizes that they are written for."""
    if device.type != "cuda" or top_k == "all" or find_spec("triton") is None:
        return False
    from builder.capture import kernels

    draws = 0 if uniforms_NM is None else uniforms_NM.shape[1]
    return top_k <= kernels.MAX_TOP_K and draws <= kernels.MAX_DRAWS


class _Workspace:
    """Memory for the float32 logits of a few rows and their softmax, used again for the next rows."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        padded = -(-vocab_size // WIDE) * WIDE
        limit = CUDA_WORKSPACE_BYTES if device.type == "cuda" else CPU_WORKSPACE_BYTES
        self.num_rows = max(1, limit // (4 * padded))
        self._logits_RP = torch.empty(self.num_rows, padded, device=device)
        self._probs_RP = torch.empty_like(self._logits_RP)

    def load(self, logits_RV: Tensor) -> tuple[Tensor, Tensor]:
        """The logits in float32, padded with −inf to whole blocks, and room for their softmax."""
        rows, vocab_size = logits_RV.shape
        logits_RP = self._logits_RP[:rows]
        logits_RP[:, :vocab_size] = logits_RV
        logits_RP[:, vocab_size:] = -torch.inf
        return logits_RP, self._probs_RP[:rows]


def _capture_rows(
    logits_RV: Tensor,
    targets_R: Tensor,
    top_k: int,
    uniforms_RM: Tensor | None,
    x_RP: Tensor,
    room_RP: Tensor,
) -> Distribution:
    """The columns of a top K and of draws from what is outside it. Overwrites x_RP and room_RP."""
    topk_logits_RK, topk_ids_RK = _top(x_RP, top_k)
    x_RP.scatter_(1, topk_ids_RK, -torch.inf)
    tail_R, tail_mean_R = _logsumexp_and_mean(x_RP, room_RP)

    max_R = topk_logits_RK[:, 0]
    shifted_RK = topk_logits_RK - max_R[:, None]
    exp_RK = shifted_RK.exp()
    rest_R = (tail_R - max_R).exp()
    sum_R = exp_RK.sum(-1) + rest_R
    logsumexp_R = max_R + sum_R.log()
    # Σ p (x − max). nansum: where x is −inf, exp is 0 and 0 · −inf adds nothing. A NaN in x shows in sum_R.
    rest_weighted_R = torch.where(rest_R > 0, rest_R * (tail_mean_R - max_R), 0.0)
    weighted_R = (shifted_RK.mul_(exp_RK).nansum(-1) + rest_weighted_R) / sum_R
    found = {
        "topk_indices": topk_ids_RK.int(),
        "topk_logprobs": _to_float16(topk_logits_RK - logsumexp_R[:, None]),
        "tail_logprob": _to_float16(tail_R - logsumexp_R),
        "target_logprob": _target_logprob(logits_RV, targets_R, logsumexp_R),
        "logsumexp": logsumexp_R,
        # H = −Σ p log p = log S − Σ p (x − max), all terms of one sign.
        "entropy": _to_float16(sum_R.log() - weighted_R),
    }
    if uniforms_RM is not None:
        drawn_RM = draw(uniforms_RM, room_RP, block_size=WIDE)
        has_tail_R1 = (tail_R > -torch.inf)[:, None]
        drawn_RM = torch.where(has_tail_R1, drawn_RM, topk_ids_RK[:, -1:])
        drawn_RM = drawn_RM.clamp(max=logits_RV.shape[1] - 1)  # where a row holds NaN
        logits_RM = logits_RV.gather(1, drawn_RM).float().masked_fill(~has_tail_R1, -torch.inf)
        found["tail_indices"] = drawn_RM.int()
        found["tail_logprobs"] = _to_float16(logits_RM - logsumexp_R[:, None])
    return found


def _capture_all(
    logits_RV: Tensor, targets_R: Tensor, x_RP: Tensor, room_RP: Tensor
) -> Distribution:
    """The columns of a whole distribution. Overwrites x_RP and room_RP."""
    max_R = x_RP.amax(-1)
    sum_R, mean_R = _logsumexp_and_mean(x_RP.sub_(max_R[:, None]), room_RP)
    logsumexp_R = max_R + sum_R
    return {
        "logprobs": _to_float16(logits_RV.float() - logsumexp_R[:, None]),
        "target_logprob": _target_logprob(logits_RV, targets_R, logsumexp_R),
        "logsumexp": logsumexp_R,
        "entropy": _to_float16(sum_R - mean_R),  # as in `_capture_rows`
    }


def _logsumexp_at(temperature: float, x_RP: Tensor, room_RP: Tensor) -> Tensor:
    """log Σ exp(x / T) of each row, [R]. Overwrites room_RP."""
    max_R = x_RP.amax(-1)
    torch.sub(x_RP, max_R[:, None], out=room_RP)
    return max_R / temperature + room_RP.div_(temperature).exp_().sum(-1).log()


def _target_logprob(logits_RV: Tensor, targets_R: Tensor, logsumexp_R: Tensor) -> Tensor:
    target_logits_R = logits_RV.gather(1, targets_R.clamp(min=0)[:, None])[:, 0].float()
    return _to_float16(target_logits_R - logsumexp_R).masked_fill(targets_R < 0, torch.nan)


def _top(x_RP: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K largest entries of each row and their ids, by falling value, equal ones by lower id: [R, K] each."""
    rows, padded = x_RP.shape
    row_R1 = torch.arange(rows, device=x_RP.device)[:, None]

    max_RB = x_RP.unflatten(1, (-1, WIDE)).amax(-1)
    wide_RB = _best(max_RB, torch.arange(max_RB.shape[1], device=x_RP.device), top_k)
    wide_rows = (wide_RB + row_R1 * (padded // WIDE)).flatten()
    entries_RBN = x_RP.view(-1, WIDE).index_select(0, wide_rows).view(rows, -1, NARROW)

    narrow_RB = _best(entries_RBN.amax(-1), _parts(wide_RB, WIDE // NARROW), top_k)
    narrow_rows = (narrow_RB + row_R1 * (padded // NARROW)).flatten()
    candidates_RC = x_RP.view(-1, NARROW).index_select(0, narrow_rows).view(rows, -1)
    best_keys_RK = _keys(candidates_RC, _parts(narrow_RB, NARROW)).topk(top_k).values
    return _values_of(best_keys_RK), _ids_of(best_keys_RK)


def _logsumexp_and_mean(x_RP: Tensor, room_RP: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp(x) and Σ p x of each row, [R] each. Overwrites both arguments."""
    max_R = x_RP.amax(-1)
    probs_RP = torch.softmax(x_RP, -1, out=room_RP)
    logsumexp_R = max_R - probs_RP.amax(-1).log()
    mean_R = x_RP.mul_(probs_RP).nansum(-1)
    return torch.where(max_R == -torch.inf, max_R, logsumexp_R), mean_R


def _best(values_RB: Tensor, ids: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest values of each row (all, if there are fewer), in no order."""
    keys_RB = _keys(values_RB, ids)
    return _ids_of(keys_RB.topk(min(count, keys_RB.shape[1]), sorted=False).values)


def _parts(blocks_RB: Tensor, count: int) -> Tensor:
    """Ids of the `count` parts of each block, [R, B · count]."""
    return (blocks_RB[..., None] * count + torch.arange(count, device=blocks_RB.device)).flatten(1)


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that order float32 values, equal ones by lower id: no two keys are equal, so top-k is unique.

    The bits of a float32 order like an integer once those of negative numbers are flipped; they become the
    upper half of the key, and the complement of the id the lower one.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes −0.0 equal to 0.0
    return (_flip_negative(bits).long() << 32) | (ids ^ 0xFFFF_FFFF)


def _values_of(keys: Tensor) -> Tensor:
    return _flip_negative((keys >> 32).int()).view(torch.float32)


def _ids_of(keys: Tensor) -> Tensor:
    return (keys & 0xFFFF_FFFF) ^ 0xFFFF_FFFF


def _flip_negative(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> 31) & 0x7FFF_FFFF)


def _to_float16(values: Tensor) -> Tensor:
    return values.clamp(min=FLOAT16_MIN).half()
