"""A dataset in the teacher's vocabulary → rows in the vocabulary of a small student; no mass is lost, and none is made up.

A 49,152-row embedding is eight times a student of 1M parameters. Here the n most frequent ids keep a place, and all others become the one
id `other`. (`retokenize` is the other way out: a student with a tokenizer of its own.)

After any projection `topk_indices` hold student's ids, −1 in a place that has become empty (its log-probability is −65504), and
what cannot be told goes into `tail_logprob`: the sum of all mass stays what it was. `entropy` stays the teacher's own; columns about raw logits and about the teacher's token (`logsumexp…`,
`target_logprob`) make no sense any more and are dropped, so that a temperature is refused.

Shape suffixes: N positions, K top-k, J tail draws, V teacher's vocabulary.
"""

import hashlib
from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from logit_dataset.load import LogitDataset
from logit_dataset.rows import EMPTY, Array, Rows
from logit_dataset.schema import FLOAT16_MIN


class FrequentTokens:
    """Project onto the most frequent ids and `other`, the last id. If every teacher id is kept, this is the identity.

    Kept ids stay in the order of the teacher's vocabulary. A listed id that is kept retains its exact log-probability. The mass of the other
    listed ids certainly belongs to `other`; it is `other_logprob`, and `other_indices` holds the id, the same at every position. The tail
    stays the teacher's: how much more of it belongs to `other`, and how much to kept ids outside the teacher's top K, is unknown. So
    Σ exp(topk) + exp(other) + exp(tail) is preserved, and exp(other) is a lower bound (`divergences` says how losses use it). Sampled tail
    tokens tell more: each goes to its own kept id or to `other`. For whole distributions (`logprobs`, then [N, n + 1]), nothing is unknown.
    """

    def __init__(
        self, token_counts_V: npt.ArrayLike, num_kept: int, *, always_keep: Sequence[int] = ()
    ) -> None:
        """Choose the ids.

        Args:
            token_counts_V: occurrences of each id (`LogitDataset.token_counts`); of two equal counts, the lower id wins.
            num_kept: n; the student has n + 1 logits.
            always_keep: ids to keep however rare they are, such as the end-of-sequence token.

        Raises:
            ValueError: num_kept exceeds the vocabulary or is less than always_keep needs, or always_keep names an id outside it.
        """
        counts_V = np.asarray(token_counts_V)
        if not len(set(always_keep)) <= num_kept <= len(counts_V):
            raise ValueError(
                f"num_kept is {num_kept}, expected {len(set(always_keep))} (always_keep) to {len(counts_V)} (the vocabulary)"
            )
        if unknown := [i for i in always_keep if not 0 <= i < len(counts_V)]:
            raise ValueError(
                f"always_keep names the id {unknown[0]}, but the teacher's vocabulary has the ids 0 to {len(counts_V) - 1}"
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

    @classmethod
    def of(cls, data: LogitDataset, num_kept: int, *, always_keep: Sequence[int] = ()) -> Self:
        """Keep the ids that are most frequent in a dataset's texts, and the end-of-sequence token, which no text contains but students must learn.

        Args:
            data: the dataset. Its texts are read once (`input_ids` only).
            num_kept: n, as in the constructor; all ids, if the vocabulary has fewer.
            always_keep: as in the constructor; for example, the tokens of a chat template.

        Raises:
            ValueError: as in the constructor.
        """
        counts_V, eos = data.token_counts(), data.manifest["teacher"]["eos_token_id"]
        keep = [*always_keep] if eos is None else [*always_keep, eos]
        return cls(counts_V, min(num_kept, len(counts_V)), always_keep=keep)

    def __call__(self, rows: Rows) -> Rows:
        """Rows in the student's vocabulary."""
        columns = {name: values for name, values in rows.columns.items() if not _is_dropped(name)}
        columns["input_ids"] = self._map_V[columns["input_ids"]]
        targets_N = columns["target_ids"]
        columns["target_ids"] = np.where(
            targets_N >= 0, self._map_V[np.maximum(targets_N, 0)], targets_N
        )
        if "logprobs" in columns:
            columns["logprobs"] = self._whole(columns["logprobs"])
            return Rows(lengths_R=rows.lengths_R, columns=columns)
        ids_NK = columns["topk_indices"]
        mapped_NK = np.where(ids_NK == EMPTY, np.int32(self.other), self._map_V[ids_NK])
        is_kept_NK = mapped_NK != self.other
        logprobs_NK = columns["topk_logprobs"]
        other_N = np.exp(
            logprobs_NK, dtype=np.float64, where=~is_kept_NK, out=np.zeros(mapped_NK.shape)
        ).sum(-1)
        columns["topk_indices"] = np.where(is_kept_NK, mapped_NK, np.int32(EMPTY))
        nothing = logprobs_NK.dtype.type(FLOAT16_MIN)
        columns["topk_logprobs"] = np.where(is_kept_NK, logprobs_NK, nothing)
        columns["other_indices"] = np.full(len(other_N), self.other, dtype=np.int32)
        columns["other_logprob"] = add_mass(np.full(len(other_N), FLOAT16_MIN), other_N)
        if "tail_indices" in columns:
            columns["tail_indices"] = self._map_V[columns["tail_indices"]]
        return Rows(lengths_R=rows.lengths_R, columns=columns)

    def _whole(self, logprobs_NV: Array) -> Array:
        """[N, n + 1] float32: the kept ids' log-probabilities as they are, and that of all others together."""
        logprobs_NS = np.empty((len(logprobs_NV), self.vocab_size), dtype=np.float32)
        logprobs_NS[:, :-1] = logprobs_NV[:, self.kept]
        gone_N = np.full(len(logprobs_NV), FLOAT16_MIN)
        others_NV = logprobs_NV[:, self._map_V == self.other]
        logprobs_NS[:, -1] = add_mass(gone_N, np.exp(others_NV, dtype=np.float32).sum(-1))
        return logprobs_NS


def add_mass(logprob_N: Array, more_N: npt.NDArray[np.float64]) -> Array:
    """log(exp(logprob) + more) in float32; unchanged where there is no more."""
    with np.errstate(divide="ignore"):
        total: Array = np.logaddexp(logprob_N.astype(np.float64), np.log(more_N)).astype(np.float32)
    return total


def _is_dropped(name: str) -> bool:
    return name in ("target_logprob", "tail_logprobs") or name.startswith("logsumexp")
