"""A finished dataset → one of its rows, the token that follows it, and its teacher: what looking at single rows needs."""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from builder.corpus.sequences import NO_TOKEN
from builder.dataset.identity import differences
from builder.dataset.manifest import FILE_NAME, of_split, read_manifest, records_of
from builder.dataset.shards import nested_values
from builder.dataset.unpacking import check_unpacked_size
from builder.recipe.file import read_section
from builder.recipe.recipe import is_below
from builder.recipe.sections import TeacherRecipe
from builder.sources.known import KnownSources
from builder.sources.resolve import TeacherSource, resolve_teacher
from builder.teacher.loading import load_tokenizer
from logit_dataset.schema import shortest_cut


def teacher_source(manifest: dict[str, Any], teacher_path: Path | None = None) -> TeacherSource:
    """Where to load a dataset's teacher from.

    Raises:
        ValueError: it cannot be found, or is another one than the manifest names.
    """
    values = dict(manifest["recipe"]["teacher"])
    if values.get("python"):
        return _checked(manifest, _python_source(values, teacher_path))
    is_local = bool(values.get("path") or values.get("gguf"))
    if teacher_path is not None:
        if not is_local:
            raise ValueError(
                "--teacher is for datasets of a local teacher, but this one names a teacher on the Hub; leave it out"
            )
        values["gguf" if values.get("gguf") else "path"] = str(teacher_path.absolute())
    if values.get("repo"):
        if not manifest["teacher"].get("commit"):
            raise ValueError(
                f"{FILE_NAME}: no 'teacher.commit', which identifies its teacher; fetch or build the dataset again"
            )
        values["revision"] = manifest["teacher"]["commit"]
    recipe = read_section(TeacherRecipe, values, "recipe.teacher")
    try:
        source = resolve_teacher(recipe, Path(), KnownSources())
    except ValueError as error:
        hint = ", or give it with --teacher PATH" if is_local else ""
        raise ValueError(f"{error}{hint}") from None
    return _checked(manifest, source)


def _python_source(values: dict[str, Any], teacher_path: Path | None) -> TeacherSource:
    """The Python file that the user names, and its weights beside it. A file that a manifest names is not run."""
    names = [values["python"], *values.get("weights", ())]
    if not all(isinstance(name, str) and is_below(name) for name in names):
        raise ValueError(
            f"{FILE_NAME}: recipe.teacher names files outside of its directory; fetch or build the dataset again"
        )
    if teacher_path is None:
        beside = f" and {', '.join(map(repr, names[1:]))}" if names[1:] else ""
        raise ValueError(
            f"the teacher is its author's own code, which is never run from a dataset: get {names[0]!r}{beside}, read the code, and give its path with --teacher PATH (its weights beside it)"
        )
    file, known = teacher_path.absolute(), KnownSources()
    depth = len(Path(names[0]).parts)
    bases = [file.parents[depth - 1], file.parent]
    weights = [
        next((str(base / name) for base in bases if (base / name).is_file()), Path(name).name)
        for name in names[1:]
    ]
    recipe = read_section(
        TeacherRecipe, {**values, "python": str(file), "weights": weights}, "recipe.teacher"
    )
    return resolve_teacher(recipe, file.parent, known)


def _checked(manifest: dict[str, Any], source: TeacherSource) -> TeacherSource:
    """A source, if it is the one that a manifest pins."""
    recorded = {key: manifest["teacher"].get(key) for key in source.provenance}
    changes = differences(recorded, source.provenance, "teacher")
    if changes := [change for change in changes if not change.startswith("teacher.name")]:
        raise ValueError(
            f"the teacher at hand is not the dataset's: {'; '.join(changes)}. Give the dataset's teacher"
        )
    return source


def dataset_tokenizer(manifest: dict[str, Any], teacher_path: Path | None = None) -> Any:
    """The tokenizer of a dataset's teacher.

    Raises:
        ValueError: it cannot be found, or is another one than the manifest names.
    """
    source = teacher_source(manifest, teacher_path)
    return load_tokenizer(
        source.location, commit=source.commit, tokenizer=source.tokenizer, weights=source.weights
    )


def file_of_row(directory: Path, row: int, split: str | None = None) -> tuple[str, int]:
    """The data file that holds a row, and the row's number in it.

    Args:
        directory: of the dataset.
        row: its number in the split; in all of them, one after the other, without one.
        split: `train` or `validation`.

    Raises:
        ValueError: there is no such row or split.
    """
    first = 0
    for record in records_of(of_split(read_manifest(directory), split)):
        if first <= row < first + record.rows:
            return record.file, row - first
        first += record.rows
    where = f"split {split} of {directory}" if split else str(directory)
    raise ValueError(f"{where} has rows 0 to {first - 1}, not {row}; choose one of these")


def read_row(file: Any, number: int, columns: list[str] | None = None) -> dict[str, Any]:
    """One row of a Parquet file (a path or an open file): strings and numbers as such, token ids as a list, the rest as arrays.

    Raises:
        IndexError: the file has no such row.
        ValueError: its row group unpacks to more than any dataset's does.
    """
    return next(read_rows(file, [number], columns))


def read_rows(
    file: Any, numbers: list[int], columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Some rows of a Parquet file, as `read_row` gives them; each row group is decoded once.

    Args:
        file: a path or an open file.
        numbers: of the rows, rising.
        columns: to read; None for all.

    Raises:
        IndexError: the file has no such row.
        ValueError: a row group unpacks to more than any dataset's does.
    """
    parquet = pq.ParquetFile(file, page_checksum_verification=True)
    wanted, first = deque(numbers), 0
    for group in range(parquet.num_row_groups):
        stop = first + parquet.metadata.row_group(group).num_rows
        if wanted and wanted[0] < stop:
            if isinstance(file, Path):
                check_unpacked_size(file, parquet.metadata, group)
            table = parquet.read_row_group(group, columns=columns)
            while wanted and wanted[0] < stop:
                yield _row_values(table.slice(wanted.popleft() - first, 1))
        first = stop
    if wanted:
        raise IndexError(wanted[0])


def _row_values(table: pa.Table) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_list(column.type) and name != "input_ids":
            values[name] = nested_values(column)
        else:
            values[name] = column.to_pylist()[0]
    return values


def what_follows(
    manifest: dict[str, Any],
    name: str,
    number: int,
    row: dict[str, Any],
    open_file: Callable[[str], Any],
) -> tuple[int, bool]:
    """The token after the last one of a row, and whether the document certainly ends with the row.

    The token is NO_TOKEN where nothing follows, or where it is not known because the document may have been cut short.

    Args:
        manifest: of the dataset.
        name: of the data file that holds the row.
        number: of the row in it.
        row: from `read_row`.
        open_file: a data file's name → its path, or the open file.
    """
    columns = ["id", "chunk_index", "input_ids"]
    try:
        following = read_row(open_file(name), number + 1, columns)
    except IndexError:
        records = records_of(manifest)
        record = next(record for record in records if record.file == name)
        if record.ends_within is None:
            return follow(manifest, row, None)
        place = record.partition, record.index + 1
        rest = [other.file for other in records if (other.partition, other.index) == place]
        if not rest:  # a limit of the corpus was reached within the document
            return follow(manifest, row, None, is_cut_off=True)
        following = read_row(open_file(rest[0]), 0, columns)
    return follow(manifest, row, following)


def follow(
    manifest: dict[str, Any],
    row: dict[str, Any],
    following: dict[str, Any] | None,
    *,
    is_cut_off: bool = False,
) -> tuple[int, bool]:
    """The same, of a row and the one that stands behind it, if there is one.

    Args:
        manifest: of the dataset.
        row: from `read_row`.
        following: the next row, of the same document or not.
        is_cut_off: whether the rest of the document is known to be left out.
    """
    if following and goes_on(row, following):
        return int(following["input_ids"][len(manifest["teacher"]["prefix_ids"])]), False
    if is_cut_off or len(row["input_ids"]) >= shortest_cut(manifest):
        return NO_TOKEN, False
    eos = manifest["teacher"]["eos_token_id"]
    return NO_TOKEN if eos is None else int(eos), True


def goes_on(row: dict[str, Any], following: dict[str, Any]) -> bool:
    """Whether a row is the next chunk of another one's document."""
    place: tuple[str, int] = (row["id"], row["chunk_index"] + 1)
    return place == (following["id"], following["chunk_index"])
