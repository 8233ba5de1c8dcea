"""What pydantic finds wrong → one line that says what was found and what was expected."""

import difflib
import json
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

EXPECTED = {
    "string_type": 'text in quotes, such as "x"',
    "string_too_long": "at most {max_length:,} characters",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": 'a list, such as ["x"]',
    "dict_type": "a table, such as {{ x = 1 }}",
    "model_type": "a section of keys and values",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}
"""What a value should be, by the kind of problem that pydantic reports."""
PATTERNS = {
    "name": "at most 96 letters, digits, '.', '-' and '_', starting with a letter or a digit",
    "license": "a licence identifier, such as apache-2.0 or cc-by-sa-4.0",
    "language": "a language code of two or three lowercase letters, such as en, or the word code or multilingual",
}
"""What a text should be, by the key."""


def problems(error: ValidationError, recipe: type[BaseModel]) -> str:
    """What is wrong with a recipe, in one line: of every wrong key, what was found and what was expected.

    Args:
        error: as pydantic reports it.
        recipe: the model, which knows the keys.
    """
    return "; ".join(_explain(problem, recipe) for problem in error.errors(include_url=False))


def expected(problem: Any) -> str:
    """What a value should be, as a person says it."""
    message = problem["msg"].removeprefix("Value error, ")
    if words := EXPECTED.get(problem["type"]):
        message = f"expected {words.format(**problem.get('ctx', {}))}"
    elif problem["type"] == "string_pattern_mismatch":
        named = [str(part) for part in problem["loc"] if part in PATTERNS]
        message = f"expected {PATTERNS[named[-1]]}"
    return str(message)


def _explain(problem: Any, recipe: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: Any = recipe
        for part in problem["loc"][:-1]:
            annotation = section.model_fields[part].annotation
            section = next(
                iter(get_args(annotation)), annotation
            )  # of a section that may be absent
        names = list(section.model_fields)
        near = difflib.get_close_matches(problem["loc"][-1], names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
        return f"unknown key {where!r}; {hint}"
    if problem["type"] == "missing":
        return f"{where!r} is missing: add it"
    given = "" if isinstance(problem["input"], dict) else f" (found {_shown(problem['input'])})"
    return f"{where}: {expected(problem)}{given}" if where else expected(problem)


def _shown(value: Any) -> str:
    """A value as TOML writes it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"
