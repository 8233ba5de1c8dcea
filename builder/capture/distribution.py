"""Raw logits of some positions → the statistics that are stored for them, exactly and in bounded memory.

In:   pieces of logits_NV, the teacher's raw logits (float32, bfloat16 or float16), and the ids of the tokens that really
      follow.
Out:  a Distribution: exact top K (ties by lower id), tail mass, target, logsumexp and entropy of each position.

How:  everything comes from a float32 softmax over the whole vocabulary at temperature 1, computed for a few rows at a time
      that stay in the processor's cache, so that no float32 copy of [N, V] is ever made.

      The tail.  In a row without its top K, one softmax p gives Σ exp(x − max x) = 1 / max p and the mean Σ p x. So the
      tail is a sum of positive terms relative to its own largest, exact however small it is, where 1 − Σ exp(top K) would
      cancel or underflow. Draws are from the same p: see `draws`.

      Rounded logits, of a 16-bit teacher on a CPU, are first made right where it matters: see `rounding`. A drawn token is drawn by
      what its logit is there, and stored with its own in float32.

      On a GPU, `kernels` computes the same with one read of the logits, up to a K of 128; this way is its reference.

Cost: about 60 µs a position for V = 49,152 on two cores, where that teacher's forward pass takes 1,200 µs in bfloat16;
      `logsumexp` and `topk` alone, as one would write them, take 130 to 190 µs.

Shape suffixes: N positions, R those of a piece, V vocabulary (P padded to whole blocks), K top-k, M draws, B blocks, C candidates.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from builder.capture.draws import draw
from builder.capture.ranking import WIDE, largest
from builder.capture.rounding import refine
from builder.teacher.precision import Rounded
from logit_dataset.schema import FLOAT16_MIN, temperature_column

CPU_WORKSPACE_BYTES = 16 * 2**20
"""Float32 logits worked on at once: small enough for a last-level cache, large enough to hide the cost of a call."""
CUDA_WORKSPACE_BYTES = 128 * 2**20
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
        rounded = piece if isinstance(piece, Rounded) else None
        logits_NV = piece.logits_NV if isinstance(piece, Rounded) else piece
        if rounded is None and _has_kernels(logits_NV.device, top_k, uniforms_NM):
            from builder.capture import kernels

            rows = slice(start, start + len(logits_NV))
            found = kernels.capture_rows(
                logits_NV,
                targets_N[rows],
                top_k=int(top_k),
                uniforms_NM=None if uniforms_NM is None else uniforms_NM[rows],
                draw_logprobs=draw_logprobs,
                temperatures=temperatures,
            )
            parts.append(found)
            start = rows.stop
            continue
        if workspace is None:
            workspace = _Workspace(logits_NV.shape[1], logits_NV.device)
        first = start
        for logits_RV in logits_NV.split(workspace.num_rows):
            rows = slice(start, start + len(logits_RV))
            of_piece = slice(rows.start - first, rows.stop - first)
            x_RP, room_RP = workspace.load(logits_RV)
            targets_R = targets_N[rows]
            logits_of: LogitsOf | None = partial(_gather, logits_RV)
            top: tuple[Tensor, Tensor] | None = None
            if rounded:
                assert top_k != "all"
                logits_of = partial(rounded.pick, of_piece)
                top = refine(x_RP, rounded, of_piece, targets_R, top_k)
            elif top_k != "all":
                top = largest(x_RP, top_k)
            found = {
                temperature_column(t).name: _logsumexp_at(t, x_RP, room_RP) for t in temperatures
            }
            if top is None:
                found |= _capture_all(logits_RV, targets_R, x_RP, room_RP)
            else:
                uniforms_RM = None if uniforms_NM is None else uniforms_NM[rows]
                logits_of = logits_of if draw_logprobs else None
                found |= _capture_rows(
                    *top, targets_R, uniforms_RM, x_RP, room_RP, logits_of, logits_RV.shape[1]
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
    topk_logits_RK: Tensor,
    topk_ids_RK: Tensor,
    targets_R: Tensor,
    uniforms_RM: Tensor | None,
    x_RP: Tensor,
    room_RP: Tensor,
    logits_of: LogitsOf | None,
    vocab_size: int,
) -> Distribution:
    """The columns of a top K and of draws from what is outside it, without their log-probabilities where nothing gives logits.

    Overwrites x_RP and room_RP.
    """
    target_logits_R = x_RP.gather(1, targets_R.clamp(min=0)[:, None])[:, 0]
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
        "target_logprob": _target_logprob(target_logits_R, targets_R, logsumexp_R),
        "logsumexp": logsumexp_R,
        # H = −Σ p log p = log S − Σ p (x − max), all terms of one sign.
        "entropy": _to_float16(sum_R.log() - weighted_R),
    }
    if uniforms_RM is not None:
        drawn_RM = draw(uniforms_RM, room_RP, block_size=WIDE)
        has_tail_R1 = (tail_R > -torch.inf)[:, None]
        drawn_RM = torch.where(has_tail_R1, drawn_RM, topk_ids_RK[:, -1:])
        drawn_RM = drawn_RM.clamp(max=vocab_size - 1)  # where a row holds NaN
        found["tail_indices"] = drawn_RM.int()
        if logits_of is None:
            return found
        # None is above the K-th: only where it was drawn by a rounded logit could this change it, and then by less than storage does.
        logits_RM = logits_of(drawn_RM).minimum(topk_logits_RK[:, -1:])
        logits_RM = logits_RM.masked_fill(~has_tail_R1, -torch.inf)
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
        "target_logprob": _target_logprob(
            _gather(logits_RV, targets_R.clamp(min=0)[:, None])[:, 0], targets_R, logsumexp_R
        ),
        "logsumexp": logsumexp_R,
        "entropy": _to_float16(sum_R - mean_R),  # as in `_capture_rows`
    }


def _logsumexp_at(temperature: float, x_RP: Tensor, room_RP: Tensor) -> Tensor:
    """log Σ exp(x / T) of each row, [R]. Overwrites room_RP."""
    max_R = x_RP.amax(-1)
    torch.sub(x_RP, max_R[:, None], out=room_RP)
    return max_R / temperature + room_RP.div_(temperature).exp_().sum(-1).log()


def _target_logprob(target_logits_R: Tensor, targets_R: Tensor, logsumexp_R: Tensor) -> Tensor:
    return _to_float16(target_logits_R - logsumexp_R).masked_fill(targets_R < 0, torch.nan)


def _gather(logits_RV: Tensor, ids_RC: Tensor) -> Tensor:
    return logits_RV.gather(1, ids_RC).float()


def _logsumexp_and_mean(x_RP: Tensor, room_RP: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp(x) and Σ p x of each row, [R] each. Overwrites both arguments."""
    max_R = x_RP.amax(-1)
    probs_RP = torch.softmax(x_RP, -1, out=room_RP)
    logsumexp_R = max_R - probs_RP.amax(-1).log()
    mean_R = x_RP.mul_(probs_RP).nansum(-1)
    return torch.where(max_R == -torch.inf, max_R, logsumexp_R), mean_R


def _to_float16(values: Tensor) -> Tensor:
    return values.clamp(min=FLOAT16_MIN).half()
