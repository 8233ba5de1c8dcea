"""What stands beside a manifest and the card shows: what recomputing found, what was published, what the pictures show.

In:   `verification.json`, `release.json` and `.curves.json` of a directory, which may come from anywhere.
Out:  their values, if they are about the manifest's data, and of the types that the card relies on.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from builder.card.charts import MAX_K, Curves
from builder.dataset.manifest import data_digest
from builder.dataset.manifest_model import Count, check
from builder.dataset.telling import MAX_TOKENS

VERIFICATION, RELEASE = "verification.json", "release.json"
CURVES = ".curves.json"
"""What the pictures show of data that are no longer in the directory; stays there."""

MAX_JSON_BYTES = 2**24
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
MAX_BINS = 2**18
"""Of half a nat, up to the largest float16."""


def _repo(value: str) -> str:
    if not REPO.fullmatch(value):
        raise ValueError("expected ORG/NAME")
    return value


def _version(value: str) -> str:
    if not re.fullmatch(r"\d+\.\d+\.\d+", value, re.ASCII):
        raise ValueError("expected a version such as 1.0.0")
    return value


class _Values(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class Device(_Values):
    """Where rows were computed."""

    device: str


class Floor(_Values):
    """By how much the teacher differs from itself, in nats."""

    max_abs_error: float
    mean_abs_error: float


class Limit(_Values):
    """Beyond which a dataset is not what the teacher says, in nats."""

    max_beyond_rounding: float
    mean_abs_error: float | None = None


Share = Annotated[float, Field(ge=0, le=1.01)]


class Line(_Values):
    """The text around a position."""

    tokens: Annotated[list[str], Field(min_length=1, max_length=MAX_TOKENS)]
    surprises: list[float | None]
    followed: Count
    is_cut: bool

    @model_validator(mode="after")
    def _is_of_one_text(self) -> Self:
        if not self.followed < len(self.tokens) == len(self.surprises):
            raise ValueError("expected a surprise for each token, and which one followed")
        return self


class Example(_Values):
    """One position of a row that was recomputed."""

    context: str
    is_cut: bool
    tokens: Annotated[list[str], Field(min_length=1, max_length=5)]
    probabilities: Annotated[list[Share], Field(min_length=1, max_length=5)]
    listed: Count
    rest: Share
    tail: Share
    draws: Annotated[list[str], Field(max_length=5)]
    following: str
    rank: Count | None
    following_probability: Share | None
    entropy: float
    line: Line | None = None


class Verification(_Values):
    """What `verify --recompute --record` found."""

    date: str
    environment: Device
    rows: Count
    tokens: Count
    seed: Count
    max_abs_error: float
    mean_abs_error: float
    top1_agreement: float
    nll_stored: float
    nll_recomputed: float
    floor: Floor | None = None
    max_beyond_rounding: float | None = None
    limit: Limit | None = None
    example: Example | None = None


class Entry(_Values):
    """One version in the changelog."""

    version: str
    date: str
    changes: list[str]


class Release(_Values):
    """What `publish` says of a version and those before."""

    repo: Annotated[str, AfterValidator(_repo)]
    version: Annotated[str, AfterValidator(_version)]
    changelog: list[Entry]


class KeptCurves(_Values):
    """What the pictures show."""

    mass: Annotated[list[float], Field(min_length=1, max_length=MAX_K)]
    entropy_shares: Annotated[list[float], Field(min_length=1, max_length=MAX_BINS)]
    mean_entropy: float


def read_release(directory: Path) -> dict[str, Any] | None:
    """What an earlier `publish` wrote into a directory, if anything.

    Raises:
        ValueError: it is something else than it writes.
    """
    return _checked(directory / RELEASE, read_json(directory / RELEASE), Release)


def read_verification(directory: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The recorded result of `verify --recompute`, if it is about these data files; of a dataset without texts, none of its text.

    Raises:
        ValueError: it is about these, but something else than `verify` writes.
    """
    path = directory / VERIFICATION
    found = _checked(path, _about(path, manifest), Verification)
    if found and not manifest["recipe"]["output"]["text"]:
        found.pop("example", None)
    return found


def line_of(verification: dict[str, Any] | None) -> dict[str, Any] | None:
    """The text that one of the pictures shows; None where none was recorded, as by older versions."""
    found: dict[str, Any] | None = ((verification or {}).get("example") or {}).get("line")
    return found


def read_curves(directory: Path, manifest: dict[str, Any]) -> Curves | None:
    """What the pictures show of these data files, if that was kept.

    Raises:
        ValueError: it is something else than was kept.
    """
    path = directory / CURVES
    kept = _checked(path, _about(path, manifest), KeptCurves)
    return Curves(**{name: kept[name] for name in KeptCurves.model_fields}) if kept else None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a small file; None if there is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _about(path: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """A JSON file that says something of data files, if they are those of the manifest."""
    values = read_json(path)
    return values if values and values.get("data") == data_digest(manifest) else None


def _checked(
    path: Path, values: dict[str, Any] | None, model: type[BaseModel]
) -> dict[str, Any] | None:
    if values is None:
        return None
    try:
        check(values, model)
    except ValueError as error:
        raise ValueError(
            f"{path.name} is damaged ({error}); delete it, or fetch it again"
        ) from None
    return values
