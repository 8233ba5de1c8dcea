"""A document's id → its split: what decides the hold-out of a dataset, for who builds it or checks it.

In:   the id, the recipe's seed, and the share that is held out.
Out:  `train` or `validation`: the same wherever and whenever it is asked, whatever else the corpus holds.

How:  the first 8 bytes of the SHA-256 of "validation SEED ID", big-endian, over 2^64, are a number from 0 to 1. Below the share, it is a
      document of the hold-out; so a larger share holds all that a smaller one does.

Cost: a microsecond a document.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from logit_dataset.schema import TRAIN, VALIDATION


def split_of(document_id: str, *, share: float, seed: int) -> str:
    """The split that holds a document.

    Args:
        document_id: as the corpus has it, or a hash of the content.
        share: `output.validation` of the recipe.
        seed: `output.seed`.
    """
    digest = hashlib.sha256(f"validation {seed} {document_id}".encode()).digest()
    is_held_out = int.from_bytes(digest[:8], "big") < share * 2**64
    return VALIDATION if is_held_out else TRAIN


def document_of(row_id: str, recipe: Mapping[str, Any]) -> str:
    """The id of a row's document: without what stands behind it of a turn of a chat, or of one of several completions.

    Args:
        row_id: column `id`.
        recipe: of the manifest.
    """
    is_turn = recipe["sequences"].get("learn") == "last"
    is_sample = (recipe.get("generation") or {}).get("samples", 1) > 1
    return row_id.rpartition("/")[0] if is_turn or is_sample else row_id
