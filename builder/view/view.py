"""One dataset, or two of the same rows → the page that shows them.

In:   where the datasets are, and which rows to show.
Out:  the page, and how much it shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from builder.dataset.info import facts, spell_token
from builder.dataset.lookup import dataset_tokenizer
from builder.dataset.manifest import of_split, read_manifest, records_of
from builder.dataset.printable import one_line
from builder.view.comparison import Against, load_same_rows
from builder.view.page import WIDTH, render
from builder.view.rows import Locate, Row, load_rows


@dataclass(frozen=True, kw_only=True)
class Viewed:
    """A dataset that is looked at."""

    directory: Path
    """Of what describes it, the manifest first."""
    locate: Locate
    """Finds its data files."""
    is_here: bool
    """Whether all of them are on this machine; else every file that is looked into is fetched."""

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Of the dataset.

        Raises:
            ValueError: the directory holds no finished one.
        """
        return read_manifest(self.directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page, and how much it shows."""

    html: bytes
    rows: int
    tokens: int


def page(
    dataset: Viewed,
    *,
    rows: int,
    start: int | None = None,
    split: str | None = None,
    against: Viewed | None = None,
    teacher_path: Path | None = None,
) -> Page:
    """Render the page of a dataset.

    Args:
        dataset: to show.
        rows: maximum number of rows.
        start: first of consecutive rows; None spreads them over the dataset, or over the first file of a dataset that is not local.
        split: show rows of this split only.
        against: a dataset of the same rows, for comparison.
        teacher_path: directory or GGUF file of the teacher, if the recipe names a local one.

    Raises:
        ValueError: a row does not exist or cannot be read, the teacher's tokenizer cannot be found, or the two datasets do not hold the
            same tokens.
    """
    manifest = of_split(dataset.manifest, split)
    numbers = choose(manifest, rows, start, first_file_only=not dataset.is_here)
    tokenizer = dataset_tokenizer(manifest, teacher_path)
    shown = list(load_rows(manifest, dataset.locate, numbers))
    compared: list[Against] = []
    other = ""
    if against:
        other = _other_name(manifest, against.manifest)
        compared = load_same_rows(shown, against.manifest, against.locate)
        _check_spelling(manifest, against.manifest, tokenizer, shown, compared)
    html = render(
        name=str(manifest["recipe"]["name"]),
        description=str(manifest["recipe"].get("description") or ""),
        facts=facts(dataset.directory),
        rows=shown,
        tokenizer=tokenizer,
        other=other,
        against=compared,
    )
    return Page(html=html, rows=len(shown), tokens=sum(len(row.input_ids) for row in shown))


def choose(
    manifest: dict[str, Any], count: int, start: int | None, *, first_file_only: bool = False
) -> list[int]:
    """Numbers of rows to show, rising.

    Args:
        manifest: of the dataset.
        count: how many at most.
        start: the first of consecutive ones; None spreads them evenly.
        first_file_only: spread them over the rows of the first file.

    Raises:
        ValueError: there is no such row.
    """
    sizes = [record.rows for record in records_of(manifest)]
    if start is None:
        total = sizes[0] if first_file_only else sum(sizes)
        count = min(count, total)
        return [total * i // count for i in range(count)]
    if start >= sum(sizes):
        raise ValueError(
            f"the dataset has rows 0 to {sum(sizes) - 1}, not {start}; choose one of these"
        )
    return list(range(start, min(start + count, sum(sizes))))


def _other_name(manifest: dict[str, Any], other: dict[str, Any]) -> str:
    """A name for the dataset to compare with, which is another one than the dataset's."""
    name = str(other["recipe"]["name"])
    is_same = name == manifest["recipe"]["name"]
    return one_line(f"{name} {other['fingerprint'][:8]}" if is_same else name)


def _check_spelling(
    manifest: dict[str, Any],
    other: dict[str, Any],
    tokenizer: Any,
    rows: Sequence[Row],
    compared: Sequence[Against],
) -> None:
    """See that ids mean the same tokens in both datasets, as far as they are shown.

    Raises:
        ValueError: they do not.
    """
    if manifest["teacher"]["tokenizer_sha256"] == other["teacher"]["tokenizer_sha256"]:
        return
    try:
        theirs = dataset_tokenizer(other)
    except ValueError as error:
        raise ValueError(
            f"the other dataset has another tokenizer, with which this one cannot be compared unseen: {error}"
        ) from None
    ids = [*(row.input_ids for row in rows), *(row.ids[:, :WIDTH] for row in rows)]
    shown = np.unique(np.concatenate([a.ravel() for a in [*ids, *(c.ids for c in compared)]]))
    for token in shown[shown >= 0].tolist():
        ours, spelled = spell_token(tokenizer, token), spell_token(theirs, token)
        if ours != spelled:
            raise ValueError(
                f"token {token} is {ours!r} in the one dataset and {spelled!r} in the other; only datasets of one vocabulary can be "
                "compared token by token"
            )
