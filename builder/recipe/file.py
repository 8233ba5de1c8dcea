"""A recipe's TOML file, or a section in a manifest → the validated model.

What a run may choose freely (device, output directory, when to stop early) is a flag of the command line and not here.
"""

import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from builder.recipe.recipe import Recipe
from builder.recipe.sections import Section
from builder.recipe.syntax import what_is_wrong
from builder.recipe.wording import expected, problems

_AnySection = TypeVar("_AnySection", bound=Section)


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        ValueError: the file is not TOML or not a valid recipe; the message names every wrong key and what was expected.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = tomllib.loads(text)
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(
            f"no recipe at {path}; name a .toml file such as dataset_cards/*/recipe.toml"
        ) from None
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path} line {number} is not UTF-8 (byte 0x{error.object[error.start]:02x}); save the recipe as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} {what_is_wrong(text, error)}") from None
    try:
        # JSON mode, since TOML and JSON share lists where Recipe has tuples.
        return Recipe.model_validate_json(json.dumps(_as_meant(values), default=str))
    except ValidationError as error:
        raise ValueError(f"{path}: {problems(error, Recipe)}") from None


def read_section(model: type[_AnySection], values: Any, where: str) -> _AnySection:
    """Read a section of a recipe from a manifest.

    Raises:
        ValueError: the section uses a key that this version does not know; the message names it.
    """
    try:
        # JSON mode, since a manifest has lists where a recipe has tuples.
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        path = ".".join([where, *map(str, problem["loc"])])
        raise ValueError(
            f"manifest.json: {path}: {expected(problem)}, so its teacher cannot be run; install the version that built the dataset"
        ) from None


def _as_meant(values: dict[str, Any]) -> dict[str, Any]:
    """What TOML makes of what people write: 1e6 is a float there, and one file no list."""
    meant = {}
    for name, section in values.items():
        if isinstance(section, dict):
            section = {
                key: int(value) if isinstance(value, float) and value.is_integer() else value
                for key, value in section.items()
            }
            for key in ("files", "weights"):
                if isinstance(section.get(key), str):
                    section[key] = [section[key]]
        meant[name] = section
    return meant
