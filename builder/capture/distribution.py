"""Raw logits of some positions → the statistics that are stored for them, exactly and in bounded memory.

In:   pieces of logits_NV, the teacher's raw logits (float32, bfloat16 or float16), and the ids of the tokens that really
      follow.
Out:  a Distribution: exact top K (ties by lower id), tail mass, target, logsumexp and entropy of each position.

How:  everything comes from a float32 softmax over the whole vocabulary at temperature 1, computed for a few rows at a time
      that stay in the processor's cache, so that no float32 copy of [N, V] is ever made. Only what reads whole rows is done so: the
      search for the top K, and then the tail. All else is of a few numbers a row, and done for a piece at once.

      The tail.  In a row without its top K, one softmax p gives log Σ exp x = x_j − log p_j for any j, here the K + 1st or, if logits
      are rounded, one next to it, and the mean Σ p x. So the tail is a sum of positive terms relative to its own largest, exact
      however small it is, where 1 − Σ exp(top K) would cancel or underflow. Draws are from the same p: see `draws`.

      Rounded logits, of a 16-bit teacher on a CPU, are first made right where it matters: see `rounding`. A drawn token is drawn by
      what its logit is there, and stored with its own in float32.

      On a GPU, `kernels` computes the same with one read of the logits, up to a K of 128; this way is its reference.

Cost: 38 µs a position for V = 49,152 on two cores and 47 for rounded logits, where that teacher's forward pass takes 2,000 µs in
      float32 and 620 in bfloat16.

Shape suffixes: N positions, R those worked on at once, V vocabulary (P padded to whole blocks), K top-k, M draws, B blocks, C candidates.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from builder.capture.draws import draw
from builder.capture.ranking import WIDE, largest
from builder.capture.rounding import best_count, refine
from builder.teacher.precision import Rounded
from logit_dataset.schema import FLOAT16_MIN, temperature_column

CPU_WORKSPACE_BYTES = 16 * 2**20
"""Float32 logits worked on at once, and room for their softmax: small enough for a last-level cache, large enough to hide the cost of a call."""
CUDA_WORKSPACE_BYTES = 256 * 2**20
"""The same on a GPU, where a piece must fill the device rather than fit a cache."""


LogitsOf = Callable[[Tensor], Tensor]
"""[R, M] ids of some rows → their logits in float32."""

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
    pieces: Iterable[Tensor | Rounded],
    targets_N: Tensor,
    *,
    top_k: int | Literal["all"],
    uniforms_NM: Tensor | None = None,
    draw_logprobs: bool = True,
    temperatures: Sequence[float] = (),
) -> Distribution:
    """The stored statistics of N positions.

    Args:
        pieces: raw logits [n, V] of consecutive positions, in any float type, on one device, or rounded ones where K is a number;
            together N of them.
        targets_N: id of the token that really follows each position, or −1 where none does; on the same device.
        top_k: how many of the V entries to keep, 1 to V, or all of them, in the order of their ids.
        uniforms_NM: numbers from `draws.uniforms`, on the same device, where M tokens are to be drawn from the tail.
        draw_logprobs: whether the log-probabilities of these are wanted, too.
        temperatures: other ones at which the logsumexp is wanted.

    Returns:
        The statistics on the device of the logits. Positions whose logits hold NaN or +inf, or nothing but
        −inf, have a logsumexp that is not finite; the caller must look before it stores anything.
    """
    parts: list[Distribution] = []
    workspace = None
    start = 0
    for piece in pieces:
        logits_NV = piece.logits_NV if isinstance(piece, Rounded) else piece
        rows = slice(start, start + len(logits_NV))
        start = rows.stop
        targets, uniforms = targets_N[rows], None if uniforms_NM is None else uniforms_NM[rows]
        if logits_NV is piece and _has_kernels(logits_NV.device, top_k, uniforms_NM):
            from builder.capture import kernels

            found = kernels.capture_rows(
                logits_NV,
                targets,
                top_k=int(top_k),
                uniforms_NM=uniforms,
                draw_logprobs=draw_logprobs,
                temperatures=temperatures,
            )
            parts.append(found)
            continue
        workspace = workspace or _Workspace(logits_NV.shape[1], logits_NV.device)
        if top_k == "all":
            parts.append(_capture_all(logits_NV, targets, workspace, temperatures))
        else:
            found = _capture_top(
                piece, targets, workspace, top_k, uniforms, draw_logprobs, temperatures
            )
            parts.append(found)
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
    """Memory for the float32 logits of a few rows, used again for the next rows."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        padded = -(-vocab_size // WIDE) * WIDE
        limit = CUDA_WORKSPACE_BYTES if device.type == "cuda" else CPU_WORKSPACE_BYTES
        self._vocab_size = vocab_size
        self._memory_RP = torch.empty(max(2, limit // (4 * padded)), padded, device=device)

    def each(self, logits_NV: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Some rows after others, [R, P], to be read: in float32, padded with −inf to whole blocks."""
        if (
            logits_NV.dtype == torch.float32
            and logits_NV.is_contiguous()
            and self._vocab_size % WIDE == 0
        ):
            return iter([(slice(0, len(logits_NV)), logits_NV)])
        return self._each(logits_NV, self._memory_RP)

    def each_with_room(self, logits_NV: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The same of half as many rows at once, which may be written over, and as much memory besides."""
        x_RP, room_RP = self._memory_RP.split(len(self._memory_RP) // 2)[:2]
        for rows, part_RP in self._each(logits_NV, x_RP):
            yield rows, part_RP, room_RP[: len(part_RP)]

    def _each(self, logits_NV: Tensor, memory_RP: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, max(1, len(logits_NV)), len(memory_RP)):
            rows = slice(start, min(start + len(memory_RP), len(logits_NV)))
            x_RP = memory_RP[: rows.stop - rows.start]
            x_RP[:, : self._vocab_size] = logits_NV[rows]
            x_RP[:, self._vocab_size :] = -torch.inf
            yield rows, x_RP


def _capture_top(
    piece: Tensor | Rounded,
    targets_N: Tensor,
    workspace: _Workspace,
    top_k: int,
    uniforms_NM: Tensor | None,
    draw_logprobs: bool,
    temperatures: Sequence[float],
) -> Distribution:
    """The columns of a top K and of draws from what is outside it."""
    rounded = piece if isinstance(piece, Rounded) else None
    logits_NV = piece.logits_NV if isinstance(piece, Rounded) else piece
    num_rows, vocab_size = logits_NV.shape
    # One more than K: the largest of the tail.
    count = best_count(top_k, vocab_size) if rounded else min(top_k + 1, vocab_size)
    found_tops = [largest(x_RP, count) for _, x_RP in workspace.each(logits_NV)]
    top_NK, ids_NK = (torch.cat(parts) for parts in zip(*found_tops, strict=True))
    logits_of: LogitsOf = partial(_gather, logits_NV)
    refined = None
    if rounded:
        refined = refine(rounded, top_NK, ids_NK, targets_N, top_k)
        top_NK, ids_NK = refined.top_NK, refined.top_ids_NK
        logits_of = partial(rounded.pick, slice(0, num_rows))
    next_N1, top_NK, ids_NK = ids_NK[:, -1:], top_NK[:, :top_k], ids_NK[:, :top_k]

    tail_N, tail_mean_N, target_N = (top_NK.new_empty(num_rows) for _ in range(3))
    logsumexp_TN = top_NK.new_empty(len(temperatures), num_rows)
    drawn = []
    for rows, x_RP, room_RP in workspace.each_with_room(logits_NV):
        if refined:
            refined.put(x_RP, rows)
        for i, temperature in enumerate(temperatures):
            logsumexp_TN[i, rows] = _logsumexp_at(temperature, x_RP, room_RP)
        target_N[rows] = x_RP.gather(1, targets_N[rows].clamp(min=0)[:, None])[:, 0]
        x_RP.scatter_(1, ids_NK[rows], -torch.inf)
        tail_N[rows], tail_mean_N[rows] = _logsumexp_and_mean(x_RP, room_RP, next_N1[rows])
        if uniforms_NM is not None:
            drawn.append(draw(uniforms_NM[rows], room_RP, block_size=WIDE))

    logsumexp_N, entropy_N = _logsumexp_and_entropy(top_NK, tail_N, tail_mean_N)
    found = {
        **_by_temperature(temperatures, logsumexp_TN),
        "topk_indices": ids_NK.int(),
        "topk_logprobs": _to_float16(top_NK - logsumexp_N[:, None]),
        "tail_logprob": _to_float16(tail_N - logsumexp_N),
        "target_logprob": _target_logprob(target_N, targets_N, logsumexp_N),
        "logsumexp": logsumexp_N,
        "entropy": _to_float16(entropy_N),
    }
    if uniforms_NM is None:
        return found
    has_tail_N1 = (tail_N > -torch.inf)[:, None]
    drawn_NM = torch.where(has_tail_N1, torch.cat(drawn), ids_NK[:, -1:])
    drawn_NM = drawn_NM.clamp(max=vocab_size - 1)  # where a row holds NaN
    found["tail_indices"] = drawn_NM.int()
    if draw_logprobs:
        # None is above the K-th: only where it was drawn by a rounded logit could this change it, and then by less than storage does.
        logits_NM = logits_of(drawn_NM).minimum(top_NK[:, -1:])
        logits_NM = logits_NM.masked_fill(~has_tail_N1, -torch.inf)
        found["tail_logprobs"] = _to_float16(logits_NM - logsumexp_N[:, None])
    return found


def _logsumexp_and_entropy(
    top_NK: Tensor, tail_N: Tensor, tail_mean_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the whole distribution, [N] each, from the K largest logits, and the logsumexp and mean logit of all others."""
    max_N = top_NK[:, 0]
    shifted_NK = top_NK - max_N[:, None]
    exp_NK = shifted_NK.exp()
    rest_N = (tail_N - max_N).exp()
    sum_N = exp_NK.sum(-1) + rest_N
    log_sum_N = sum_N.log()
    # Σ p (x − max). nansum: where x is −inf, exp is 0 and 0 · −inf adds nothing. A NaN in x shows in sum_N.
    rest_weighted_N = torch.where(rest_N > 0, rest_N * (tail_mean_N - max_N), 0.0)
    weighted_N = (shifted_NK.mul_(exp_NK).nansum(-1) + rest_weighted_N) / sum_N
    # H = −Σ p log p = log S − Σ p (x − max), all terms of one sign.
    return max_N + log_sum_N, log_sum_N - weighted_N


def _capture_all(
    logits_NV: Tensor, targets_N: Tensor, workspace: _Workspace, temperatures: Sequence[float]
) -> Distribution:
    """The columns of a whole distribution."""
    parts = []
    for rows, x_RP, room_RP in workspace.each_with_room(logits_NV):
        at = [_logsumexp_at(temperature, x_RP, room_RP) for temperature in temperatures]
        max_R1, largest_R1 = x_RP.max(-1, keepdim=True)
        target_R = x_RP.gather(1, targets_N[rows].clamp(min=0)[:, None])[:, 0]
        sum_R, mean_R = _logsumexp_and_mean(x_RP.sub_(max_R1), room_RP, largest_R1)
        logsumexp_R = max_R1[:, 0] + sum_R
        parts.append(
            {
                **_by_temperature(temperatures, at),
                "logprobs": _to_float16(logits_NV[rows].float() - logsumexp_R[:, None]),
                "target_logprob": _target_logprob(target_R, targets_N[rows], logsumexp_R),
                "logsumexp": logsumexp_R,
                "entropy": _to_float16(sum_R - mean_R),  # as in `_logsumexp_and_entropy`
            }
        )
    return concatenate(parts)


def _by_temperature(
    temperatures: Sequence[float], logsumexps: Iterable[Tensor]
) -> dict[str, Tensor]:
    names = (temperature_column(temperature).name for temperature in temperatures)
    return dict(zip(names, logsumexps, strict=True))


def _logsumexp_at(temperature: float, x_RP: Tensor, room_RP: Tensor) -> Tensor:
    """log Σ exp(x / T) of each row, [R]. Overwrites room_RP."""
    max_R = x_RP.amax(-1)
    torch.sub(x_RP, max_R[:, None], out=room_RP)
    return max_R / temperature + room_RP.div_(temperature).exp_().sum(-1).log()


def _target_logprob(target_logits_R: Tensor, targets_R: Tensor, logsumexp_R: Tensor) -> Tensor:
    return _to_float16(target_logits_R - logsumexp_R).masked_fill(targets_R < 0, torch.nan)


def _gather(logits_RV: Tensor, ids_RC: Tensor) -> Tensor:
    return logits_RV.gather(1, ids_RC).float()


def _logsumexp_and_mean(x_RP: Tensor, room_RP: Tensor, largest_R1: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp(x) and Σ p x of each row, [R] each, where it is known which entry is the largest, or next to it. Overwrites x_RP, and
    room_RP with p."""
    max_R = x_RP.gather(1, largest_R1)[:, 0]
    probs_RP = torch.softmax(x_RP, -1, out=room_RP)
    logsumexp_R = max_R - probs_RP.gather(1, largest_R1)[:, 0].log()
    mean_R = x_RP.mul_(probs_RP).nansum(-1)
    return torch.where(max_R == -torch.inf, max_R, logsumexp_R), mean_R


def _to_float16(values: Tensor) -> Tensor:
    return values.clamp(min=FLOAT16_MIN).half()
