"""A dataset in the teacher's vocabulary → rows in the vocabulary of a small student; no mass is lost, and none is made up.

A 49,152-row embedding is eight times a student of 1M parameters. Here the n most frequent ids keep a place, and all others become the one
id `other`. (`retokenize` is the other way out: a student with a tokenizer of its own.)

After any projection `topk_indices` hold student's ids, −1 in a place that has become empty (its log-probability is −65504), and
what cannot be told goes into `tail_logprob`: Σ exp(topk) + exp(tail) stays what it was. The tail is then the event "any student's
token that is not listed". `entropy` stays the teacher's own; columns about raw logits and about the teacher's token (`logsumexp…`,
`target_logprob`) make no sense any more and are dropped, so that a temperature is refused.

Shape suffixes: N positions, K top-k, J tail draws, V teacher's vocabulary.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from builder.schema import FLOAT16_MIN
from builder.student.rows import EMPTY, Array, Rows


class FrequentTokens:
    """Projects onto the most frequent ids and `other`, the last id. With all ids of the teacher, in their order, it is the identity.

    Ids keep the order that they have in the teacher's vocabulary. A listed id that keeps a place keeps its log-probability, exactly. The
    other listed ids join the tail: so the tail is everything that is not listed, whether it has a place (and was outside the teacher's top K) or is
    part of `other`, and how the two share it is not known. Where the dataset has draws from the tail, it is: each draw stands for its
    share of the tail, at its own place or at `other`, and one more entry for the listed mass that is at `other` for certain.
    """

    def __init__(
        self, token_counts_V: npt.ArrayLike, num_kept: int, *, always_keep: Sequence[int] = ()
    ) -> None:
        """Choose the ids.

        Args:
            token_counts_V: how often each id occurs (`LogitDataset.token_counts`); of two equal ones the lower id is taken.
            num_kept: n; the student has n + 1 logits.
            always_keep: ids that have a place however rare they are, such as the end of a sequence.

        Raises:
            ValueError: there are not so many ids, or more than that must be kept.
        """
        counts_V = np.asarray(token_counts_V)
        if not len(set(always_keep)) <= num_kept <= len(counts_V):
            raise ValueError(
                f"num_kept is {num_kept}, expected {len(set(always_keep))} (always_keep) to {len(counts_V)} (the vocabulary)"
            )
        must_V = np.isin(np.arange(len(counts_V)), list(always_keep))
        order_V = np.lexsort((np.arange(len(counts_V)), -counts_V, ~must_V))
        self.kept: npt.NDArray[np.int64] = np.sort(order_V[:num_kept])
        """[n]: the teacher's id of each of the student's ids."""
        self.other = num_kept
        """The student's id of everything else, as a token of the text too."""
        self.vocab_size = num_kept + 1
        self._map_V = np.full(len(counts_V), self.other, dtype=np.int32)
        self._map_V[self.kept] = np.arange(num_kept, dtype=np.int32)
        self.fingerprint = hashlib.sha256(self._map_V.tobytes()).hexdigest()

    def __call__(self, rows: Rows) -> Rows:
        """Rows in the student's vocabulary."""
        columns = {name: values for name, values in rows.columns.items() if not _is_dropped(name)}
        columns["input_ids"] = self._map_V[columns["input_ids"]]
        targets_N = columns["target_ids"]
        columns["target_ids"] = np.where(
            targets_N >= 0, self._map_V[np.maximum(targets_N, 0)], targets_N
        )
        ids_NK = columns["topk_indices"]
        mapped_NK = np.where(ids_NK == EMPTY, np.int32(self.other), self._map_V[ids_NK])
        is_kept_NK = mapped_NK != self.other
        logprobs_NK, tail_N = columns["topk_logprobs"], columns["tail_logprob"]
        other_N = np.exp(
            logprobs_NK, dtype=np.float64, where=~is_kept_NK, out=np.zeros(mapped_NK.shape)
        ).sum(-1)
        columns["topk_indices"] = np.where(is_kept_NK, mapped_NK, np.int32(EMPTY))
        columns["topk_logprobs"] = np.where(
            is_kept_NK, logprobs_NK, logprobs_NK.dtype.type(FLOAT16_MIN)
        )
        columns["tail_logprob"] = add_mass(tail_N, other_N)
        if "tail_indices" in columns:
            draws_NJ = self._map_V[columns["tail_indices"]]
            shares_NJ = np.exp(tail_N[:, None].astype(np.float64)) / draws_NJ.shape[1]
            shares_NJ = np.broadcast_to(shares_NJ, draws_NJ.shape)
            certain_N1 = np.full((len(draws_NJ), 1), self.other, dtype=np.int32)
            columns["tail_indices"] = np.concatenate([draws_NJ, certain_N1], axis=1)
            columns["tail_masses"] = np.concatenate([shares_NJ, other_N[:, None]], axis=1).astype(
                np.float32
            )
        return Rows(lengths_R=rows.lengths_R, columns=columns)


def add_mass(logprob_N: Array, more_N: npt.NDArray[np.float64]) -> Array:
    """log(exp(logprob) + more) in float32; unchanged where there is no more."""
    with np.errstate(divide="ignore"):
        total: Array = np.logaddexp(logprob_N.astype(np.float64), np.log(more_N)).astype(np.float32)
    return total


def _is_dropped(name: str) -> bool:
    return name in ("target_logprob", "tail_logprobs") or name.startswith("logsumexp")
