"""What of a plan decides the data: fingerprints, and in what two plans differ.

A plan is the recipe as plain values, with the exact corpus and teacher behind it: {"recipe": …, "corpus": …, "teacher": …}.
"""

import hashlib
import json
from typing import Any

from logit_dataset.schema import SCHEMA_VERSION

DESCRIPTIVE = {
    "": ("name", "description"),
    "corpus": ("license", "language"),
    "teacher": ("license",),
}
"""Fields that the card shows and no byte of the data depends on."""
LIMITS = ("max_documents", "max_tokens")
"""Fields of the corpus that say how many rows there are, but change none."""

PINNED = {
    "corpus": ("files", "revision"),
    "teacher": ("path", "gguf", "tokenizer", "revision"),
    "sequences": ("chat_template",),
}
"""Fields for which a plan holds hashes or a commit, so that how they are spelled decides nothing."""


BESIDE_THE_HASH = ("tokenizer_source", "tokenizer_file_sha256")
"""What is said of a teacher's tokenizer beside `tokenizer_sha256`, which alone decides. Older code said neither."""


def fingerprint(plan: dict[str, Any]) -> str:
    """SHA-256 of everything that decides the data: the recipe, and the exact corpus and teacher behind it."""
    return _sha256({**deciding(plan), "schema_version": SCHEMA_VERSION})


def row_fingerprint(plan: dict[str, Any]) -> str:
    """SHA-256 of what decides each row: as `fingerprint`, but the same for any number of rows.

    It stands in every Parquet file, so that a dataset that goes on where a smaller one stopped shares its files with it.
    """
    return _sha256({**deciding_rows(plan), "schema_version": SCHEMA_VERSION})


def deciding_rows(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan without what changes no row: as `deciding`, and without how many rows there are."""
    values = deciding(plan)
    corpus = {key: value for key, value in values["recipe"]["corpus"].items() if key not in LIMITS}
    return {**values, "recipe": {**values["recipe"], "corpus": corpus}}


def deciding(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan without what changes no byte: fields for the card, and how the recipe spells what the plan pins."""
    recipe = without_description(plan["recipe"])
    for section, pinned in PINNED.items():
        values = recipe[section].items()
        recipe[section] = {key: value for key, value in values if key not in pinned}
    return {**plan, "recipe": recipe}


def without_description(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain values without the fields that only the card shows."""
    kept = {key: value for key, value in recipe.items() if key not in DESCRIPTIVE[""]}
    for section in ("corpus", "teacher"):
        values = recipe[section].items()
        kept[section] = {key: value for key, value in values if key not in DESCRIPTIVE[section]}
    return kept


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line for each field in which two plans differ, e.g. `recipe.output.top_k: 50 → 20`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if old == new else [f"{path}: {_short(old)} → {_short(new)}"]


def teacher_differences(recorded: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """As `differences`, of what two loaded teachers turned out to be."""
    old, new = (
        {key: value for key, value in values.items() if key not in BESIDE_THE_HASH}
        for values in (recorded, found)
    )
    return differences(old, new)


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:76]} …"
