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
    "teacher": ("path", "gguf", "python", "weights", "tokenizer", "config", "revision"),
    "sequences": ("chat_template",),
}
"""Fields for which a plan holds hashes or a commit, so that how they are spelled decides nothing."""


BESIDE_THE_HASH = ("tokenizer_source", "tokenizer_file_sha256")
"""What is said of a teacher's tokenizer beside `tokenizer_sha256`, which alone decides. Older code said neither."""


LOADED = (
    *("architecture", "parameters", "dtype", "attention", "vocab_size", "hidden_size"),
    *("tokenizer_vocab_size", "tokenizer_sha256", "eos_token_id", "prefix_ids", "suffix_ids"),
    *("generation_eos_ids", "quantisation", "tokenizer_source", "tokenizer_file_sha256"),
    *("head_dtype", "state_sha256", "greedy_drafts"),
)
"""Of a manifest's teacher, what loading it has shown; the rest is of the plan."""


def fingerprint(plan: dict[str, Any], schema_version: str | None = None) -> str:
    """SHA-256 of everything that decides the data: the recipe, and the exact corpus and teacher behind it."""
    return _sha256({**deciding(plan), "schema_version": schema_version or SCHEMA_VERSION})


def row_fingerprint(plan: dict[str, Any], schema_version: str | None = None) -> str:
    """SHA-256 of what decides each row: as `fingerprint`, but the same for any number of rows.

    It stands in every Parquet file, so that a dataset that goes on where a smaller one stopped shares its files with it.
    """
    return _sha256({**deciding_rows(plan), "schema_version": schema_version or SCHEMA_VERSION})


def plans_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The plan that a manifest was made from, in each way in which that may be read off it; its fingerprints say which it was.

    The manifest adds what loading has shown to the plan's teacher: behind it, so that all before `architecture` is the plan's, whatever
    a later version may add; or by name, where somebody has sorted the keys.
    """
    teacher, recipe = manifest["teacher"], manifest["recipe"]
    first_loaded = list(teacher).index("architecture")
    by_place = dict(list(teacher.items())[:first_loaded])
    # A template that the recipe names is pinned by the plan, the tokenizer's own by the teacher.
    loaded = LOADED if recipe["sequences"].get("chat_template") else (*LOADED, "chat_template_sha256")  # fmt: skip
    by_name = {key: value for key, value in teacher.items() if key not in loaded}
    recipes = [recipe]
    if manifest["schema_version"].startswith(("1.0.", "1.1.")):
        recipes.append(_as_before_1_2(recipe))
    return [
        {"recipe": one, "corpus": manifest["corpus"], "teacher": source}
        for one in recipes
        for source in (by_place, by_name)
    ]


def _as_before_1_2(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the keys that were unknown to schema 1.1, which a new description of such a dataset has."""
    off = {"corpus": ("messages_column", None), "output": ("completions_only", False)}
    older = dict(recipe)
    for section, (key, value) in off.items():
        older[section] = {k: v for k, v in recipe[section].items() if (k, v) != (key, value)}
    return older


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
