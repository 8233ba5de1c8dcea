"""A finished dataset and a recipe → in what they differ, in the data or in their description alone.

In:   the manifest, the recipe, and the directory at which its relative paths start.
Out:  one line for each field that differs.

How:  what a recipe leaves open is settled as it was then (attention, columns, batches, the commit behind a branch), so that only
      what was asked for is compared.

Cost: local files of the corpus are hashed, where nothing else differs.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from builder.dataset.identity import differences, without_description
from builder.recipe.recipe import Recipe
from builder.sources.known import KnownSources
from builder.sources.resolve import read_chat_template, resolve_corpus, template_provenance


def changes_since(manifest: dict[str, Any], recipe: Recipe, base: Path) -> list[str]:
    """In what the data of a finished dataset differ from what a recipe asks for, one line for each field."""
    published = published_as(manifest, recipe)
    old, new = (without_description(values) for values in (_recorded(manifest), published))
    changes = differences(old, new)
    with suppress(ValueError):  # as with files of a corpus
        template = template_provenance(read_chat_template(recipe.sequences, base))
        built = {key: manifest["teacher"].get(key) for key in template}
        changes += differences(built, template, "teacher")
    if not changes and recipe.corpus.files:
        with suppress(ValueError):  # files that are gone do not make the dataset less finished
            source = resolve_corpus(recipe.corpus, base, KnownSources())
            changes = differences(manifest["corpus"], source.provenance, "corpus")
    return changes


def described_anew(manifest: dict[str, Any], recipe: Recipe) -> list[str]:
    """In what a recipe that asks for the data of a finished dataset differs from that one's, one line for each field."""
    return differences(_recorded(manifest), published_as(manifest, recipe))


def _recorded(manifest: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a manifest; what a schema before 1.2 had no name for was off."""
    output = {"completions_only": False, **manifest["recipe"]["output"]}
    return {**manifest["recipe"], "output": output}


def published_as(manifest: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """A recipe's plain values, with what was resolved then: attention, columns, and the branch where it names its commit."""
    attention = manifest["recipe"]["teacher"].get("attention", "sdpa")
    recipe = recipe.with_columns(manifest["recipe"]["corpus"])
    recipe = recipe.with_head_dtype(manifest["recipe"]["teacher"])
    recipe = recipe.with_batch_tokens(manifest["recipe"]["sequences"])
    published = recipe.published(attention=attention)
    for section in ("corpus", "teacher"):
        if published[section]["revision"] == manifest[section].get("commit"):
            published[section]["revision"] = manifest["recipe"][section]["revision"]
    return published
