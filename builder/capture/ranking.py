"""The K largest entries of each row, exactly: by falling value, equal ones by lower id.

In:   float32 rows, padded with −inf to whole blocks.
Out:  values and ids, [R, K] each.

How:  a row is cut into blocks of WIDE entries, and these into blocks of NARROW ones. The K largest entries lie in the K blocks with the
      largest maxima, and there in the K narrow blocks with the largest maxima: only those K · NARROW candidates are sorted. A block is
      ranked by (maximum, lower id), as an entry is, so ties stay exact.

Cost: one read of the row, and K · (WIDE + NARROW) entries of it once more.

Shape suffixes: R rows, P entries of one, K top-k, B blocks, C candidates.
"""

import torch
from torch import Tensor

WIDE, NARROW = 64, 8


def largest(x_RP: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
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
    best_keys_RK = keys_of(candidates_RC, _parts(narrow_RB, NARROW)).topk(top_k).values
    return values_of(best_keys_RK), ids_of(best_keys_RK)


def _best(values_RB: Tensor, ids: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest values of each row (all, if there are fewer), in no order."""
    keys_RB = keys_of(values_RB, ids)
    return ids_of(keys_RB.topk(min(count, keys_RB.shape[1]), sorted=False).values)


def _parts(blocks_RB: Tensor, count: int) -> Tensor:
    """Ids of the `count` parts of each block, [R, B · count]."""
    return (blocks_RB[..., None] * count + torch.arange(count, device=blocks_RB.device)).flatten(1)


def keys_of(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that order float32 values, equal ones by lower id: no two keys are equal, so top-k is unique.

    The bits of a float32 order like an integer once those of negative numbers are flipped; they become the
    upper half of the key, and the complement of the id the lower one.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes −0.0 equal to 0.0
    return (_flip_negative(bits).long() << 32) | (ids ^ 0xFFFF_FFFF)


def values_of(keys: Tensor) -> Tensor:
    """The float32 values of keys."""
    return _flip_negative((keys >> 32).int()).view(torch.float32)


def ids_of(keys: Tensor) -> Tensor:
    """The ids of keys."""
    return (keys & 0xFFFF_FFFF) ^ 0xFFFF_FFFF


def _flip_negative(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> 31) & 0x7FFF_FFFF)
