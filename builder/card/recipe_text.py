"""The recipe of a manifest → the TOML that a reader saves to build the same data again."""

import json
import re
from typing import Any

from pydantic import BaseModel

from builder.dataset.printable import steers
from builder.recipe.recipe import Recipe
from builder.recipe.sections import (
    CorpusRecipe,
    GenerationRecipe,
    OutputRecipe,
    SequencesRecipe,
    TeacherRecipe,
)
from builder.sources.resolve import Sources


def recipe_toml(recipe: dict[str, Any], manifest: dict[str, Any]) -> str:
    """A recipe that builds the same data again: what differs from the defaults, with commits for branches."""
    sections: dict[str, type[BaseModel]] = {
        "corpus": CorpusRecipe,
        "teacher": TeacherRecipe,
        "sequences": SequencesRecipe,
        "generation": GenerationRecipe,
        "output": OutputRecipe,
    }
    lines = [f"{key} = {_toml(recipe[key])}" for key in ("name", "description") if recipe.get(key)]
    for section, model in sections.items():
        values = dict(recipe.get(section) or {})
        if section == "teacher" and values.get("dtype") != "float32":
            values.setdefault("head_dtype", "teacher")  # as older code did without saying so
        if commit := manifest.get(section, {}).get("commit"):
            values["revision"] = commit
        if values.get("python"):
            values.pop("attention", None)  # it is the code's own
        defaults = {
            name: field.get_default(call_default_factory=True)
            for name, field in model.model_fields.items()
        }
        kept = [
            f"{_key(key)} = {_toml(value)}"
            for key, value in values.items()
            if value not in (defaults.get(key), None, [])
        ]
        if kept:
            lines += ["", f"[{section}]", *kept]
    return "\n".join(lines) + "\n"


def resolved_toml(recipe: Recipe, sources: Sources) -> str:
    """A recipe with every key that it has or has by default, commits for branches, and the attention that was chosen.

    Args:
        recipe: whose columns are settled.
        sources: of it.
    """
    values = recipe.model_dump(mode="json")
    teacher = values["teacher"]
    teacher["attention"] = None if recipe.teacher.python else sources.teacher.attention
    if recipe.teacher.dtype == "float32":
        del teacher["head_dtype"]  # there is no other
    if recipe.output.top_k == "all":
        del values["output"]["tail_samples"]  # there is no tail
    if recipe.output.top_k == "all" or not recipe.output.tail_samples:
        del values["output"]["tail_logprobs"]
    if recipe.corpus.messages_column:
        del values["corpus"]["text_column"]
    for section, commit in (("corpus", sources.corpus.commit), ("teacher", sources.teacher.commit)):
        if not values[section]["repo"]:
            del values[section]["revision"]
        elif commit:
            values[section]["revision"] = commit
    if not recipe.corpus.repo:
        del values["corpus"]["split"]
    lines = [
        "# Resolved: keys with their defaults. Keys that are not set are left out; docs/recipe.md has all.",
        *(f"{key} = {_toml(value)}" for key, value in values.items() if type(value) is str),
    ]
    for section, keys in values.items():
        if isinstance(keys, dict):
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {_toml(value)}" for key, value in keys.items() if value not in (None, [], {})]  # fmt: skip
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    """A key, which a later version may have added."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name, re.ASCII) else _toml(name)


def _toml(value: Any) -> str:
    """A string, number, truth value, list or table as TOML, whose strings are JSON's with other escapes."""
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return "".join(map(_escape, json.dumps(value, ensure_ascii=False)))


def _escape(character: str) -> str:
    if not steers(character):
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
