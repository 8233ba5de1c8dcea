"""A local file of texts or of lines → its rows, in bounded memory.

In:   .txt files, of which each is a text or each line is one, files of JSON lines, and CSV; all also as .gz or .zst.
Out:  rows {"text": …}: of a line, or of a whole file; a file of more than HELD_CHARACTERS is a LongText, which is read again for its parts.
      Of CSV, the columns that its first line names, all of them texts, as they are written (RFC 4180).

How:  UTF-8, and line ends are \\n, whatever the system's are. A long text is read once for its hash and its length, then from its beginning
      whenever its parts are asked for. Compressed files are read to their very end: one that was cut off is an error, also where its
      decompressor would be content, and .zst files of several frames are read whole.

Cost: 300 MB/s, and 0.1 ms a file.
"""

import codecs
import csv
import gzip
import hashlib
import io
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import zstandard

JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
PART = 2**16
"""Characters of a part of a text."""
HELD_CHARACTERS = 2**21
"""Texts of whole files are held up to this length."""
CONTEXT_BYTES = 64
"""Before a byte that is not UTF-8, that an error can show."""
BLOCK_BYTES = 2**18
"""That are read at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongText:
    """The text of a large file."""

    parts: Callable[[], Iterator[str]]
    """Reads it from its beginning, part by part."""
    sha256: str
    """Of its UTF-8."""
    length: int
    """In characters."""
    is_blank: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """Local files as a stream of rows."""

    files: tuple[Path, ...]
    unit: Literal["file", "line"]
    """What a row is; of JSON lines, always a line."""

    @property
    def num_shards(self) -> int:
        """Files."""
        return len(self.files)

    def is_json(self, file: int) -> bool:
        """Whether a file is one of JSON lines."""
        return is_json_lines(self.files[file])

    def is_csv(self, file: int) -> bool:
        """Whether a file is CSV."""
        return suffix_of(self.files[file]) == ".csv"

    def unit_of(self, file: int) -> Literal["file", "line"]:
        """What a row of a file is."""
        return "line" if self.is_json(file) or self.is_csv(file) else self.unit

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows of all files; errors as for `rows`."""
        for file in range(self.num_shards):
            yield from self.rows(file)

    def rows(self, file: int) -> Iterator[dict[str, Any]]:
        """The rows of one file: each `text` is a str, or a LongText.

        Raises:
            OSError, EOFError, ValueError, csv.Error, zlib.error, zstandard.ZstdError: it cannot be read.
        """
        if self.unit_of(file) == "file":
            yield {"text": _whole_text(self.files[file])}
            return
        if self.is_csv(file):
            yield from _records(self.files[file])
            return
        with io.TextIOWrapper(_open(self.files[file]), encoding="utf-8") as lines:
            for line in lines:
                yield {"text": line.removesuffix("\n")}


def is_json_lines(path: Path) -> bool:
    """Whether a file is one of JSON lines, by its name."""
    return suffix_of(path) in JSON_LINES


def suffix_of(path: Path) -> str:
    """The end of a file's name that says what is in it, compressed or not."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def _records(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # of the whole process; a text may be long
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as lines:
        records = csv.reader(lines, strict=True)
        names = next(records, [])
        if len(set(names)) < len(names):
            raise ValueError(f"its first line names a column twice: {', '.join(names)}")
        for record in records:
            if not record:
                continue  # an empty line
            if len(record) != len(names):
                raise ValueError(
                    f"line {records.line_num:,} has {len(record)} values, but the first line names {len(names)} columns; put quotation marks around a text with a comma"
                )
            yield dict(zip(names, record, strict=True))


def _whole_text(path: Path) -> str | LongText:
    with closing(_parts(path)) as parts:
        held, length = [], 0
        for part in parts:
            held.append(part)
            length += len(part)
            if length > HELD_CHARACTERS:
                break
        else:
            return "".join(held)
        digest, is_blank = hashlib.sha256(), True
        for part in held:
            digest.update(part.encode())
            is_blank = is_blank and not part.strip()
        held.clear()
        for part in parts:
            digest.update(part.encode())
            is_blank = is_blank and not part.strip()
            length += len(part)
    return LongText(
        parts=lambda: _parts(path),
        sha256=digest.hexdigest(),
        length=length,
        is_blank=is_blank,
    )


def _parts(path: Path) -> Generator[str]:
    """The text of a file without a byte order mark, which is no text."""
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder("utf-8-sig")(), translate=True
    )
    before = b""
    with _open(path) as file:
        while content := file.read(BLOCK_BYTES):
            if text := _decode(decoder, content, before):
                yield text
            before = content[-CONTEXT_BYTES:]
    if text := _decode(decoder, b"", before, final=True):
        yield text


def _decode(
    decoder: io.IncrementalNewlineDecoder, content: bytes, before: bytes, *, final: bool = False
) -> str:
    """The characters of a block. An error shows what is before it, in the block before, too."""
    try:
        return decoder.decode(content, final)
    except UnicodeDecodeError as error:
        held = max(
            0, len(error.object) - len(content)
        )  # bytes of a character that the block before began
        ahead = before[: len(before) - held]
        start, end = error.start + len(ahead), error.end + len(ahead)
        raise UnicodeDecodeError(
            error.encoding, ahead + error.object, start, end, error.reason
        ) from None


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_Frames(path.open("rb")), BLOCK_BYTES))
    return path.open("rb")


class _Frames(io.RawIOBase):
    """The content of all frames of a .zst file; the decompressor's own reader stops at the first one, and where a file was cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._left = b""
        """Of the file, not decompressed."""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]
        while not self._content:
            block = self._left or self._raw.read(BLOCK_BYTES)
            self._left = b""
            if not block:
                if self._frame is not None:
                    raise EOFError("the compressed file ends before its end-of-stream marker")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._content = memoryview(self._frame.decompress(block))
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
