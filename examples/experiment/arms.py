"""The nine arms: what a student is told about the token that follows, and what telling it costs.

Each arm is a loss of `logit_dataset` on the same batch; only the oracle has one of its own, a plain dense cross-entropy. What the
teacher says is put into the student's vocabulary by `StudentVocabulary`, as for any small student.

Shape suffixes: B rows, T positions, N those that count, K top-k, V student's vocabulary.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from examples.experiment.splits.draws import Split
from logit_dataset import FrequentTokens, distillation_loss
from logit_dataset.rows import Rows

Batch = dict[str, Tensor]
Loss = Callable[[Tensor, Batch], Tensor]


class StudentVocabulary:
    """`FrequentTokens` for datasets that also have a column of samples."""

    def __init__(
        self,
        frequent: FrequentTokens,
        teacher_vocab_size: int,
        told: Callable[[Rows], Rows] | None = None,
    ) -> None:
        """Project as `frequent` does, what `told` makes of the rows of the dataset."""
        self.frequent, self._told = frequent, told
        self.vocab_size, self.fingerprint = frequent.vocab_size, f"samples-{frequent.fingerprint}"
        self.place_V = np.full(teacher_vocab_size, frequent.other, dtype=np.int32)
        """[V]: the student's id of each of the teacher's ids."""
        self.place_V[frequent.kept] = np.arange(len(frequent.kept), dtype=np.int32)

    def __call__(self, rows: Rows) -> Rows:
        """Rows in the student's vocabulary."""
        projected = self.frequent(self._told(rows) if self._told else rows)
        columns = {**projected.columns, "samples": self.place_V[rows.columns["samples"]]}
        return Rows(lengths_R=projected.lengths_R, columns=columns)


def text(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy on the token that follows."""
    return distillation_loss(logits_BTV, batch, text_weight=1.0)


def argmax(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy on the teacher's most probable token."""
    first_BT = batch["topk_indices"][..., 0]
    return _hard(logits_BTV, batch, first_BT.where(first_BT >= 0, batch["other_indices"]))


def sample(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy on one token drawn from the teacher, the same in every epoch."""
    return _hard(logits_BTV, batch, batch["samples"][..., 0])


def samples(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy on the frequencies among fifty tokens drawn from the teacher."""
    told = {name: values for name, values in batch.items() if not name.startswith("other_")}
    told |= {name: batch[name][..., :0] for name in ("topk_indices", "topk_logprobs")}
    told |= {"tail_indices": batch["samples"], "tail_logprob": torch.zeros_like(batch["entropy"])}
    return distillation_loss(logits_BTV, told, loss="tail_draws")


def renormalised(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """The usual top-50 distillation."""
    return distillation_loss(logits_BTV, batch, loss="renormalised_top_k")


def tail_bucket(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Top 50, and one event for everything else."""
    return distillation_loss(logits_BTV, batch, loss="tail_bucket")


def residual(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Top 50, and the mass of everything else on the token that really follows."""
    return distillation_loss(logits_BTV, batch, loss="residual")


def tail_draws(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Top 50, and four tokens drawn from the tail that share its mass."""
    return distillation_loss(logits_BTV, batch, loss="tail_draws")


def whole(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy with the whole distribution, `batch["whole"]` [N, V] log-probabilities of the positions in the mask."""
    p_NV = batch["whole"].to(logits_BTV.dtype).exp()
    return -(p_NV * logits_BTV[batch["mask"]].log_softmax(-1)).sum(-1).mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to tell a student what follows."""

    title: str
    loss: Loss
    columns: tuple[str, ...]
    """Of the datasets, from which the target is made."""
    raw_bytes: int
    """A token, uncompressed: ids in 4 bytes, log-probabilities in 2 (for the whole distribution 49,152 of them)."""
    has_seeds: bool = True
    """Whether it is run with every seed, or with the first only."""
    needs_whole: bool = False
    """Whether its batches have `whole`."""
    split: Split | None = None
    """Of the bytes, where it is another than the dataset's."""


TOP_K = ("topk_indices", "topk_logprobs", "tail_logprob")
ARMS = {
    "text": Arm(title="text", loss=text, columns=("input_ids",), raw_bytes=4),
    "argmax": Arm(title="teacher's argmax", loss=argmax, columns=(), raw_bytes=4, has_seeds=False),
    "sample": Arm(title="one sample", loss=sample, columns=(), raw_bytes=4, has_seeds=False),
    "samples": Arm(title="fifty samples", loss=samples, columns=("samples",), raw_bytes=200),
    "renormalised": Arm(
        title="top 50 renormalised", loss=renormalised, columns=TOP_K[:2], raw_bytes=300
    ),
    "tail_bucket": Arm(title="top 50, tail bucket", loss=tail_bucket, columns=TOP_K, raw_bytes=302),
    "residual": Arm(
        title="top 50, residual on the target",
        loss=residual,
        columns=TOP_K,
        raw_bytes=302,
        has_seeds=False,
    ),
    "tail_draws": Arm(
        title="top 50 and 4 tail draws",
        loss=tail_draws,
        columns=(*TOP_K, "tail_indices"),
        raw_bytes=318,
    ),
    "whole": Arm(
        title="the whole distribution",
        loss=whole,
        columns=(),
        raw_bytes=98_304,
        needs_whole=True,
    ),
}
"""By the number of the arm: 1 to 9."""


KINDS = ("", "-heavy", "-damped", "-text")
"""What a name of a split may end in: see `split_loss`."""
FEW_DRAWS, MANY_DRAWS = 4, 24
TEXT_WEIGHT = 0.2


def arm_of(name: str) -> Arm:
    """An arm by its name: one of ARMS, or a split, such as "1+24"."""
    if name in ARMS:
        return ARMS[name]
    found = re.fullmatch(rf"(\d+)\+(\d+)({'|'.join(KINDS)})", name)
    if not found:
        raise ValueError(f"no arm {name!r}; expected one of {', '.join(ARMS)}, or a split: 50+4")
    split, kind = Split(int(found[1]), int(found[2])), found[3]
    return Arm(
        title=f"{split.top_k} + {split.num_draws}{kind.replace('-', ', ')}",
        loss=partial(split_loss, kind=kind),
        columns=(),
        raw_bytes=6 * split.top_k + 2 * (split.top_k > 0) + 4 * split.num_draws,
        needs_whole=kind == "-damped",
        split=split,
    )


def split_loss(logits_BTV: Tensor, batch: Batch, *, kind: str = "") -> Tensor:
    """Cross-entropy with the estimate p̂ that a split makes of the distribution p.

    Two kinds have the covariance of one number of draws, and the ids of another:

    -heavy   M draws, of which the first has so large a share of the tail that the covariance is that of FEW_DRAWS equal ones.
    -damped  FEW_DRAWS draws, of whose error p̂ − p so little is left that its covariance is that of MANY_DRAWS.
    -text    TEXT_WEIGHT of the loss is the text's cross-entropy.

    Cov p̂ = Σ w² (diag r − r rᵀ) p_tail² for independent draws from the tail r, with weights w that sum to 1.
    """
    if kind == "-heavy":
        ids = batch["tail_indices"]
        first = heavy_weight(ids.shape[-1])
        parts = [
            distillation_loss(logits_BTV, {**batch, "tail_indices": some}, loss="tail_draws")
            for some in (ids[..., :1], ids[..., 1:])
        ]
        return first * parts[0] + (1 - first) * parts[1]
    told = distillation_loss(
        logits_BTV, batch, loss="tail_draws", text_weight=TEXT_WEIGHT if kind == "-text" else 0.0
    )
    if kind == "-damped":
        left = (FEW_DRAWS / MANY_DRAWS) ** 0.5
        return left * told + (1 - left) * whole(logits_BTV, batch)
    return told


def heavy_weight(num_draws: int) -> float:
    """The weight a of the first of M draws for which a² + (1 − a)² / (M − 1) = 1 / FEW_DRAWS."""
    rest = num_draws - 1
    # (M) a² − 2 a + 1 − (M − 1) / FEW = 0
    a, b, c = num_draws, -2.0, 1 - rest / FEW_DRAWS
    return (-b + (b * b - 4 * a * c) ** 0.5) / (2 * a)


def _hard(logits_BTV: Tensor, batch: Batch, ids_BT: Tensor) -> Tensor:
    told = {**batch, "target_ids": ids_BT.where(batch["mask"], -100)}
    return distillation_loss(logits_BTV, told, text_weight=1.0)
