"""The rows of a dataset, file by file → whether they are whole documents in their order.

In:   id, chunk and length of each row, file after file, and what the manifest says of each file.
Out:  one line for each row or file that is wrong, and one where ids repeat.

How:  chunks follow each other, in a file and from one file to the next of its partition; a chunk that goes on is as long as chunks are;
      documents are as many as the offsets count; an id that is the hash of a text is that of this text. Ids themselves are as the
      corpus has them, repeated or not, so that repeated ones are only said. A hold-out has the documents whose ids say so, and no other.

Cost: a hash of 8 bytes a document, for at most MAX_IDS of them.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from builder.dataset.manifest import ShardRecord
from builder.dataset.printable import one_line
from builder.sources.holdout import document_of, split_of
from logit_dataset.schema import MAX_CHARACTER_TOKENS, is_generated, shortest_cut

MAX_IDS = 2**25
"""Whose hashes are compared: 268 MB. Of a larger dataset it is not told whether ids repeat."""

Add = Callable[[int, str], None]
"""Told of a row, by its place in a table, and what is wrong with it."""


class Documents:
    """Follows the documents of a dataset, or of one file of it, from row to row."""

    def __init__(self, manifest: Mapping[str, Any], *, is_whole: bool = True) -> None:
        """Begin before the first file.

        Args:
            manifest: `recipe` and `teacher` of one.
            is_whole: whether all files will be seen in their order; of a single one it is not known what it follows.
        """
        recipe, teacher = manifest["recipe"], manifest["teacher"]
        self.problems: list[str] = []
        """What was wrong with whole documents and files."""
        self._is_whole = is_whole
        self._max_length: int = recipe["sequences"]["max_length"]
        self._shortest_chunk = self._max_length - len(teacher["suffix_ids"]) - MAX_CHARACTER_TOKENS
        self._are_prompts = is_generated(recipe)
        self._are_turns = recipe["sequences"].get("learn") == "last"
        self._shortest_cut = shortest_cut(manifest)
        self._ids_are_hashes = ids_are_hashes(recipe)
        self._recipe = recipe
        self._share: float | None = recipe["output"].get("validation")
        self._split: str | None = None
        """Of the file."""
        self._place: tuple[int, int] | None = None
        """Partition and index of the last file."""
        self._previous: tuple[str, int] | None = None
        self._follows = False
        """Whether `_previous`, or the beginning of a partition, is what stands before the next row."""
        self._rest: tuple[str, int] | None = None
        """Document and chunk of the next row, where the manifest says that one goes on with it."""
        self._begun: int | None = 0
        """Documents of the partition that have begun; None where a file of it was not seen."""
        self._text: Any = None
        """Hash of the current document's text so far; None where its beginning was not seen."""
        self._last_row = ""
        """File and number of its last row."""
        self._hashes: list[npt.NDArray[np.int64]] = []
        self._num_ids = 0

    def begin(self, record: ShardRecord) -> None:
        """Come to another file."""
        follows = self._place == (record.partition, record.index - 1)
        if not follows:
            self._end_document()
            self._begun = 0 if record.index == 0 else None
            self._previous = None
        self._follows = self._is_whole and (follows or record.index == 0)
        self._place = record.partition, record.index
        self._file = record.file
        self._rest = record.begins_within
        self._split = record.split

    def check(self, table: pa.Table, lengths: npt.NDArray[np.int64], first: int, add: Add) -> None:
        """Look at some rows of the file, in their order.

        Args:
            table: with the columns `id` and `chunk_index`, and `text`, if there is one.
            lengths: tokens of each row.
            first: number of the first of them in the file.
            add: told what is wrong.
        """
        ids, chunks = table["id"].to_pylist(), table["chunk_index"].to_pylist()
        texts = table["text"].to_pylist() if self._ids_are_hashes else None
        for row, current in enumerate(zip(ids, chunks, strict=True)):
            if texts is not None:
                self._hash(current, texts[row], int(lengths[row]), first + row)
            if self._rest and self._rest != current:
                document, chunk = self._rest
                add(
                    row,
                    f"is not chunk {chunk} of {_short(document)}, with which the manifest says that a document goes on here",
                )
            elif (
                not self._rest and current[1] != 0 and self._previous is None and not self._follows
            ):
                add(
                    row,
                    f"chunk {current[1]} of {_short(current[0])} stands where the manifest says that a document begins",
                )
            self._rest = None
            if current[1] != 0 and self._follows and self._previous != (current[0], current[1] - 1):
                add(row, f"chunk {current[1]} of {_short(current[0])} does not follow chunk {current[1] - 1}")  # fmt: skip
            self._previous, self._follows = current, True
        for row in np.flatnonzero(lengths > self._max_length).tolist():
            add(row, f"has {lengths[row]:,} tokens, but recipe.sequences.max_length is {self._max_length:,}")  # fmt: skip
        for row in np.flatnonzero(lengths[:-1] < self._shortest_chunk).tolist():
            if (ids[row + 1], chunks[row + 1]) == (ids[row], chunks[row] + 1):
                add(row, f"has {lengths[row]:,} tokens, too few for a chunk behind which its document goes on")  # fmt: skip
        if self._share is not None:
            self._check_split(ids, self._share, add)
        begun = [document for document, chunk in zip(ids, chunks, strict=True) if chunk == 0]
        if self._begun is not None:
            self._begun += len(begun)
        self._num_ids += len(begun)
        if self._num_ids <= MAX_IDS:
            self._hashes.append(np.fromiter(map(hash, begun), np.int64, len(begun)))
        else:
            self._hashes.clear()

    def _check_split(self, ids: list[str], share: float, add: Add) -> None:
        seed = self._recipe["output"].get("seed", 0)
        for row, row_id in enumerate(ids):
            document = document_of(row_id, self._recipe)
            expected = split_of(document, share=share, seed=seed)
            if expected != self._split:
                add(
                    row,
                    f"{_short(document)} stands in {self._split}, but its id is one of {expected} (by recipe.output.validation and seed)",
                )

    def end(self, record: ShardRecord) -> None:
        """Come to the end of a file of which all rows were seen."""
        if (rest := record.ends_within) and self._previous != (rest[0], rest[1] - 1):
            self.problems.append(
                f"{record.file}: does not end with chunk {rest[1] - 1} of {_short(rest[0])}, of which the manifest says that it goes on"
            )
        if record.exhausted and rest:
            self._text = None  # the rest of the last document was left out
        if self._begun is None or not self._is_whole or self._are_prompts or self._are_turns:
            return  # a document may have several rows that are none of each other's chunks
        expected = record.offset_after.get("documents")
        if expected != self._begun:
            self.problems.append(
                f"{record.file}: up to its end the partition has {self._begun:,} documents, the manifest's offset says {expected}"
            )
            self._begun = None

    def skip(self) -> None:
        """Come to the end of a file of which not all rows were seen."""
        self._place = self._begun = self._previous = self._text = None
        self._follows = False

    def finish(self) -> list[str]:
        """Come to the end of the last file: all that was wrong, but for what `check` has told."""
        if self._is_whole:
            self._end_document()
        return self.problems

    def repeated(self, directory: Path, records: Iterable[ShardRecord]) -> str | None:
        """A line on documents with an id that another one has; None where there is none.

        Args:
            directory: of the dataset, to find an example.
            records: of the files in it.
        """
        if self._num_ids > MAX_IDS:
            return f"whether ids repeat was not looked at: there are {self._num_ids:,} documents, more than {MAX_IDS:,}"
        hashes = np.concatenate(self._hashes) if self._hashes else np.empty(0, np.int64)
        hashes.sort()
        again = hashes[1:][hashes[1:] == hashes[:-1]]
        if not len(again):
            return None
        places: list[str] = []
        name = ""
        for record in records:
            table = pq.read_table(directory / record.file, columns=["id", "chunk_index"])
            pairs = zip(table["id"].to_pylist(), table["chunk_index"].to_pylist(), strict=True)
            for row, (document, chunk) in enumerate(pairs):
                if chunk == 0 and hash(document) == again[0]:
                    name = document
                    places.append(f"{record.file} row {row}")
            if len(places) > 1:
                break
        return (
            f"{len(again):,} of {len(hashes):,} documents have an id that one before them has ({_short(name)} in "
            f"{' and '.join(places[:2])}); a corpus may repeat ids or texts, and ids are taken as they are"
        )

    def _hash(self, current: tuple[str, int], text: str, length: int, row: int) -> None:
        """Follow the texts of documents."""
        if current[1] == 0:
            self._end_document()
            self._text = hashlib.sha256()
        elif self._previous != (current[0], current[1] - 1):
            self._text = None
        if length >= self._shortest_cut:
            self._text = None  # the rest of it may have been left out
        if self._text is not None:
            self._text.update(text.encode())
            self._last_row = f"{self._file} row {row}"

    def _end_document(self) -> None:
        """See whether the id of the document that has ended is the hash of its text."""
        digest, self._text = self._text, None
        if digest is None or self._previous is None:
            return
        if self._previous[0] != digest.hexdigest()[:16]:
            self.problems.append(
                f"{self._last_row}: the id of the document that ends here, {_short(self._previous[0])}, is not the hash of its text"
            )


def ids_are_hashes(recipe: Mapping[str, Any]) -> bool:
    """Whether each document's id is the hash of its text, all of which is in the rows."""
    corpus = recipe["corpus"]
    return not (
        corpus.get("id_column")
        or corpus.get("embedded")
        or corpus.get("messages_column")
        or corpus.get("prompt_column")  # of prompt and completion apart
        or is_generated(recipe)
        or not recipe["output"]["text"]
    )


def _short(document: str) -> str:
    return one_line(repr(document), limit=80)
