"""A Parquet file that may come from anywhere → how much a row group unpacks to, before any of it is unpacked.

In:   a local file and its footer.
Out:  nothing, or one line on why the row group should not be decoded.

How:  48 kB can say "a thousand million zeros", in the codec and in the run lengths of an encoding. The footer tells how many values there
      are, but decoders believe the header of each page; so these are read (Thrift's compact protocol; apache/parquet-format,
      parquet.thrift, PageHeader) and have to agree with the footer. From there on, memory is bounded by what they say.

Cost: a few reads of some kB a column chunk, which has a page for each megabyte.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq

MAX_BYTES = 2**29
"""A row group may unpack to so much, however small it is: more than any that this program writes of many rows."""
MAX_RATIO = 100
"""And beyond it to so many times its size: real log-probabilities shrink to a half, constant ones to a thirtieth."""
LEVEL_BYTES = 4
"""Of the two levels that a decoder keeps for each value of a list."""

ENCODINGS = {
    *("PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY", "BYTE_STREAM_SPLIT"),
    *("DELTA_BINARY_PACKED", "DELTA_LENGTH_BYTE_ARRAY"),
}
"""Whose values take no more than their page, or a fixed size each; in others a text can repeat the one before it."""
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
HEADER_BYTES = 2**16
MAX_HEADER_BYTES = 2**24
"""As Arrow's own limit."""

DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3


def check_unpacked_size(path: Path, footer: pq.FileMetaData, group: int) -> None:
    """See that a row group unpacks to what its size can hold.

    Raises:
        ValueError: it does not, or its pages are not what the footer says.
        OSError: the file cannot be read.
    """
    row_group = footer.row_group(group)
    packed = total = 0
    with path.open("rb") as file:
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            packed += column.total_compressed_size
            total += _unpacked(file, column, footer.schema.column(index))
    if total > max(MAX_BYTES, MAX_RATIO * packed):
        raise ValueError(
            f"row group {group} unpacks from {packed:,} bytes to {total:,}, which no dataset's does; it is not read"
        )


def _unpacked(file: BinaryIO, column: Any, schema: Any) -> int:
    """Bytes in memory of a decoded column chunk, at most."""
    name = column.path_in_schema
    if unknown := set(column.encodings) - ENCODINGS:
        raise ValueError(f"column {name} is encoded as {min(unknown)}, which is not known here")
    texts = column.physical_type == "BYTE_ARRAY"
    width = 0 if texts else WIDTHS.get(column.physical_type) or schema.length
    values = total = longest = 0
    for kind, header in _pages(file, column):
        size, count = header[2], header.get({0: 5, 2: 7, 3: 8}[kind], {}).get(1)
        if not isinstance(count, int) or min(size, count) < 0:
            raise ValueError(f"column {name} has a damaged page")
        if kind == DICTIONARY_PAGE:
            longest = size if texts else width
            total += size
            continue
        values += count
        # A page of places in the dictionary may hold its longest entry again and again.
        total += max(size, count * max(width, longest)) + LEVEL_BYTES * count
    if values != column.num_values:
        raise ValueError(
            f"the pages of column {name} hold {values:,} values, the footer says {column.num_values:,}"
        )
    return total


def _pages(file: BinaryIO, column: Any) -> Iterator[tuple[int, dict[int, Any]]]:
    """Kind and header of each page of a column chunk: field number → value."""
    starts = [column.data_page_offset]
    if column.has_dictionary_page and column.dictionary_page_offset:
        starts.append(column.dictionary_page_offset)
    at, end = min(starts), min(starts) + column.total_compressed_size
    while at < end:
        size = HEADER_BYTES
        while True:
            file.seek(at)
            content = file.read(min(size, end - at))
            try:
                header, length = _Compact(content).struct()
                kind, packed = header[1], header[3]
                break
            except (IndexError, KeyError):
                if len(content) < size or size >= MAX_HEADER_BYTES:
                    raise ValueError(
                        f"column {column.path_in_schema} has no page where the footer says"
                    ) from None
                size *= 16
        if packed < 0 or at + length + packed > end:
            raise ValueError(f"a page of column {column.path_in_schema} is longer than the column")
        if kind in (DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2):
            yield kind, header
        at += length + packed


class _Compact:
    """Reads structs in Thrift's compact protocol: field number → number, bytes or struct.

    Beyond the end of what there is: an IndexError.
    """

    MAX_DEPTH = 8

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def struct(self, depth: int = 0) -> tuple[dict[int, Any], int]:
        """The next struct, and where it ends."""
        if depth > self.MAX_DEPTH:
            raise ValueError("a page header is nested too deeply")
        values: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._signed()
            values[number] = self._value(kind, depth)
        return values, self._at

    def _value(self, kind: int, depth: int) -> Any:
        match kind:
            case 1 | 2:  # a truth value is its own type
                return kind == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._signed()
            case 7:
                return self._take(8)
            case 8:
                return self._take(self._unsigned())
            case 9 | 10:
                head = self._byte()
                size = head >> 4 if head >> 4 < 15 else self._unsigned()
                if size > len(self._content):
                    raise IndexError
                return [self._value(head & 15, depth + 1) for _ in range(size)]
            case 12:
                return self.struct(depth + 1)[0]
        raise ValueError("a page header is damaged")

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]

    def _take(self, size: int) -> bytes:
        self._at += size
        if self._at > len(self._content):
            raise IndexError
        return self._content[self._at - size : self._at]

    def _unsigned(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a page header is damaged")

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
