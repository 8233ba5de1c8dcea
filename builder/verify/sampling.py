"""The teacher's logits for a row, and the numbers that its draws were made with → whether these draws are those.

In:   what was drawn: tokens of the tail, or a completion; the recipe's seed, the document, the position, on which the uniform numbers behind
      them depend alone.
Out:  for each draw how far, as a probability, its number lies from the place of the drawn token in the cumulated distribution.

How:  a draw inverts the cumulated distribution at a number u: it is the token j with F(j − 1) ≤ u < F(j). Recomputed, F differs by the
      noise of the teacher, and so the distance of u from that interval is 0 or about as small; for a draw that was made otherwise it is
      anything. Tokens of the tail are drawn in the order of their ids (`capture.draws`). Older code drew from the candidates for the top K
      first, in an order that depended on the device; of these, only their being candidates is looked at. A row has been drawn in one of
      the two ways.

Shape suffixes: T positions, C those in the loss mask, M draws, V vocabulary, K top-k.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from builder.capture.draws import uniforms
from builder.capture.ranking import NARROW, WIDE
from logit_dataset.schema import FLOAT16_MIN, Layout

SLACK = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""Probability by which a number may lie outside its token's interval: that of kernels in float32, of noise in 16 bits."""
LEAST_SHARE = {"float32": 0.998, "bfloat16": 0.9, "float16": 0.9}
"""Of draws that have to agree; others may stand at the border of the top K, or of the candidates for it. Of bfloat16 captured and recomputed
with other kernels, 98 % do, of other draws 10 % (embedded teacher, 4 draws)."""
CHANCE_SIGMAS = 5.0
"""By which the share of few draws may be below that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distances:
    """Of some draws of a row."""

    what: str
    """`tail_indices` or `the completion`."""
    values: Tensor
    """Distance of each draw's number from its token's interval, [draws]."""

    def agree(self, dtype: str) -> int:
        """How many draws are those of their numbers."""
        return int((self.values <= SLACK[dtype]).sum())


def too_few(agreeing: int, draws: int, dtype: str) -> bool:
    """Whether fewer draws agree than noise and chance explain."""
    share = LEAST_SHARE[dtype]
    slack = 1 + CHANCE_SIGMAS * (draws * share * (1 - share)) ** 0.5
    return bool(agreeing < share * draws - slack)


class TailDraws:
    """The draws from the tail of one row."""

    what = "tail_indices"

    def __init__(
        self, *, seed: int, document_id: str, chunk_index: int, mask_T: Tensor, layout: Layout
    ) -> None:
        """Make the numbers again.

        Args:
            seed: of the recipe's output.
            document_id: the row's.
            chunk_index: the row's.
            mask_T: [T] bool, positions whose draws were kept.
            layout: of the dataset.
        """
        numbers_TM = uniforms(
            seed, document_id, chunk_index, num_positions=len(mask_T), count=layout.tail_samples
        )
        self._uniforms_CM = numbers_TM[mask_T]
        self._seen = 0
        self._found: list[Tensor] = []
        self._found_formerly: list[Tensor] = []

    def see(self, logits_TV: Tensor, stored: dict[str, Tensor], mask_T: Tensor) -> None:
        """Look at the next positions.

        Args:
            logits_TV: float64, of these positions.
            stored: columns at these positions; those of several values, in the loss mask.
            mask_T: [T] bool, positions in the loss mask.
        """
        logits_CV = logits_TV[mask_T]
        stop = self._seen + len(logits_CV)
        uniforms_CM = self._uniforms_CM[self._seen : stop]
        self._seen = stop
        has_tail_C = stored["tail_logprob"][mask_T] > FLOAT16_MIN
        if not has_tail_C.any():
            return
        drawn = {
            "topk_CK": stored["topk_indices"][has_tail_C],
            "drawn_CM": stored["tail_indices"][has_tail_C],
            "uniforms_CM": uniforms_CM[has_tail_C],
        }
        self._found.append(tail_distances(logits_CV[has_tail_C], **drawn).flatten())
        formerly_CM = former_tail_distances(logits_CV[has_tail_C], **drawn)
        self._found_formerly.append(formerly_CM.flatten())

    def distances(self) -> Distances:
        """Of all that was seen, by the order of draws that explains more of them."""
        if not self._found:
            return Distances(what=self.what, values=torch.empty(0))
        ways = [torch.cat(found) for found in (self._found, self._found_formerly)]
        return Distances(what=self.what, values=min(ways, key=lambda way: float(way.mean())))


class Completion:
    """The tokens of a completion that the teacher drew."""

    what = "the completion"

    def __init__(
        self, *, generation: dict[str, Any], row_id: str, input_ids: list[int], mask_T: Tensor
    ) -> None:
        """Make the numbers again.

        Args:
            generation: the recipe's section.
            row_id: id of the row: its prompt's, with the number of the sample behind it if there are several.
            input_ids: of the row.
            mask_T: [T] bool, `completion_mask`.
        """
        document_id, sample = row_id, 0
        if generation["samples"] > 1:
            document_id, _, number = row_id.rpartition("/")
            sample = int(number) if number.isdecimal() and len(number) < 10 else 0
        self._temperature: float = generation["temperature"]
        self._warper = TopPLogitsWarper(generation["top_p"]) if generation["top_p"] < 1 else None
        written = mask_T.nonzero()[:, 0]
        self._first = int(written[0]) if len(written) else len(input_ids)
        steps = max(len(input_ids) - self._first, 1)
        self._uniforms_S = uniforms(
            generation["seed"], document_id, -1 - sample, num_positions=steps, count=1
        )[:, 0]
        self._ids = torch.tensor(input_ids)
        self._found: list[Tensor] = []

    def see(self, logits_TV: Tensor, start: int) -> None:
        """Look at some positions of the row.

        Args:
            logits_TV: float64, of these positions.
            start: number of the first of them.
        """
        # Position t has drawn token t + 1.
        steps = torch.arange(start, start + len(logits_TV)) + 1 - self._first
        is_drawn = (steps >= 0) & (steps + self._first < len(self._ids))
        if not is_drawn.any():
            return
        scores_SV = logits_TV[is_drawn] / self._temperature
        if self._warper:
            nothing: Any = None
            scores_SV = self._warper(nothing, scores_SV)
        tokens_S = self._ids[steps[is_drawn] + self._first]
        ends_SV = scores_SV.softmax(-1).cumsum(-1)
        self._found.append(
            _outside(ends_SV, tokens_S[:, None], self._uniforms_S[steps[is_drawn]][:, None])[:, 0]
        )

    def distances(self) -> Distances:
        """Of all that was seen."""
        values = torch.cat(self._found) if self._found else torch.empty(0)
        return Distances(what=self.what, values=values)


def tail_distances(
    logits_CV: Tensor, *, topk_CK: Tensor, drawn_CM: Tensor, uniforms_CM: Tensor
) -> Tensor:
    """[C, M] distance of each number from the place of its drawn token among those of the tail, in the order of ids."""
    tail_CV = logits_CV.scatter(1, topk_CK, -torch.inf).softmax(-1)
    distance_CM = _outside(tail_CV.cumsum(-1), drawn_CM, uniforms_CM)
    return distance_CM.masked_fill(_are_listed(drawn_CM, topk_CK), 1)


def former_tail_distances(
    logits_CV: Tensor, *, topk_CK: Tensor, drawn_CM: Tensor, uniforms_CM: Tensor
) -> Tensor:
    """The same of draws by older code.

    Numbers below the candidates' share of the tail point at one of these, the others at the rest of the vocabulary, by id.
    """
    # Relative to the tail's own largest: next to the head it may be nothing, in float64 too.
    probs_CV = logits_CV.scatter(1, topk_CK, -torch.inf).softmax(-1)
    is_candidate_CV = candidates(logits_CV, topk_CK.shape[1])
    beyond_C1 = (probs_CV * is_candidate_CV).sum(-1, keepdim=True)
    rest_CV = probs_CV.masked_fill(is_candidate_CV, 0)
    whole_C1 = (beyond_C1 + rest_CV.sum(-1, keepdim=True)).clamp(
        min=torch.finfo(torch.float64).tiny
    )
    share_C1 = beyond_C1 / whole_C1
    ends_CV = share_C1 + rest_CV.cumsum(-1) / whole_C1
    of_rest_CM = _outside(ends_CV, drawn_CM, uniforms_CM)
    of_candidates_CM = (uniforms_CM - share_C1).clamp(min=0)
    distance_CM = torch.where(is_candidate_CV.gather(1, drawn_CM), of_candidates_CM, of_rest_CM)
    return distance_CM.masked_fill(_are_listed(drawn_CM, topk_CK), 1)


def _are_listed(drawn_CM: Tensor, topk_CK: Tensor) -> Tensor:
    """[C, M] bool: which drawn tokens are of the top K, and so none of the tail."""
    return (drawn_CM[:, :, None] == topk_CK[:, None]).any(-1)


def candidates(logits_CV: Tensor, top_k: int) -> Tensor:
    """[C, V] bool: which entries were sorted for the top K. They are the K narrow blocks with the largest maxima, of equals the first."""
    count, size = logits_CV.shape
    padded = -(-size // WIDE) * WIDE
    wide_CP = torch.full((count, padded), -torch.inf)
    wide_CP[:, :size] = logits_CV
    maxima_CB = wide_CP.unflatten(1, (-1, NARROW)).amax(-1)
    order_CB = maxima_CB.sort(dim=-1, descending=True, stable=True).indices
    is_candidate_CB = torch.zeros_like(maxima_CB, dtype=torch.bool)
    is_candidate_CB.scatter_(1, order_CB[:, :top_k], True)
    return is_candidate_CB.repeat_interleave(NARROW, 1)[:, :size]


def _outside(ends_SV: Tensor, ids_SM: Tensor, uniforms_SM: Tensor) -> Tensor:
    """[S, M] how far each number is from the interval of its id, where the intervals end at `ends_SV`."""
    stop_SM = ends_SV.gather(1, ids_SM)
    start_SM = torch.where(ids_SM > 0, ends_SV.gather(1, (ids_SM - 1).clamp(min=0)), ends_SV.new_zeros(()))  # fmt: skip
    return torch.maximum(start_SM - uniforms_SM, uniforms_SM - stop_SM).clamp(min=0)
