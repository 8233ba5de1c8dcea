"""A dataset's card → where it is not what the manifest and the data make it.

In:   README.md, its pictures and what else decides how `load_dataset` reads the directory; the manifest; what the rows were found to be.
Out:  problems, and notices on what differs and may.

How:  a card is a pure function of manifest and data, so it is made again and compared. Of the YAML head, which decides what is loaded and
      under which licence, every value that this program writes has to be the same, and it is read as `load_dataset` reads it. An owner
      may add keys that decide nothing, and write other text below the head; so may an older version have done, whose words were
      others. That is only said.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from builder.card.card import LINE, PICTURES, README, card_head, pictures, render_body
from builder.card.charts import Curves
from builder.card.records import line_of, read_release, read_verification
from builder.dataset.printable import one_line
from builder.verify.rows import Report

REMEDY = "`logit-dataset card DIR` writes it again"
MAX_CARD_BYTES = 2**20
MAX_PICTURE_BYTES = 2**20
OVERRIDES = (".huggingface.yaml", "dataset_infos.json")
"""Files that `load_dataset` puts above, or beside, the head of a card."""
OPEN_LISTS = ("tags", "task_categories")
"""Keys to whose values an owner may add some."""
DECIDING = ("license", "license_name", "license_details", "language", "source_datasets")
"""Keys that say under which terms and of what a dataset is, whether this program has something to write there or not."""

_HEAD = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_AS_READ_BY_THE_HUB = re.compile(
    r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))"
)
"""As huggingface_hub finds a head (`repocard.py`)."""
_DRAWN = ("svg", "title", "rect", "text", "line", "polygon", "polyline", "circle")
_STYLES = re.compile(r"[\w #.,:/()-]*")


def check_card(
    directory: Path, manifest: dict[str, Any], curves: Curves | None, report: Report
) -> None:
    """Compare the card with what the manifest and the data make it, and add what is found to a report.

    Args:
        directory: of the dataset.
        manifest: of the dataset.
        curves: what the pictures show; None where not all rows were good, so that it is not known.
        report: added to.
    """
    for name in OVERRIDES:
        if (directory / name).exists():
            report.problems.append(
                f"{name}: is no part of a dataset of this program, and changes what load_dataset reads; delete it"
            )
    try:
        text = _read(directory / README, MAX_CARD_BYTES).decode().replace("\r\n", "\n")
        head, body = _split(text)
    except (OSError, ValueError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else str(error)
        report.problems.append(f"{README}: {why}, so that tensors will not load; {REMEDY}")
        return
    wrong = list(_wrong_values(head, card_head(manifest)))
    report.problems += [f"{README}: {line}; {REMEDY}" for line in wrong]
    report.notices += _additions(head, card_head(manifest))
    verification = None
    try:
        verification = read_verification(directory, manifest)
        _compare_body(directory, manifest, curves, verification, body, report)
    except ValueError as error:
        report.problems.append(one_line(error))
    drawn = pictures(curves, verification) if curves is not None else {}
    for name in PICTURES:
        if name != LINE or line_of(verification) or (directory / name).exists():
            _check_picture(directory, name, drawn, report)


def _split(text: str) -> tuple[dict[str, Any], str]:
    """The values of a card's head, and the text below it.

    Raises:
        ValueError: there is no head, or two programs would not see the same one.
    """
    match, hub = _HEAD.match(text), _AS_READ_BY_THE_HUB.search(text)
    if not match or not hub or match[1] != hub[2]:
        raise ValueError("has no YAML head between two lines of ---")
    try:
        head = yaml.load(match[1], Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"has a damaged head ({one_line(' '.join(str(error).split()), limit=120)})") from None  # fmt: skip
    if not isinstance(head, dict) or "dataset_info" not in head:
        raise ValueError("has no dataset_info in its head")
    return head, text[match.end() :]


class _PlainLoader(yaml.SafeLoader):
    """Takes what a card needs: no key twice, of which one program would take the first and another the last, and no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it holds an alias")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        again = [key for number, key in enumerate(keys) if key in keys[:number]]
        if again:
            raise ValueError(f"it has the key {again[0]!r} twice")
        return super().construct_mapping(node, deep)


def _wrong_values(head: dict[str, Any], rendered: dict[str, Any]) -> Iterator[str]:
    """What the head says otherwise than the manifest, one line each."""
    expected = {key: value for key, value in rendered.items() if value is not None}
    for key in dict.fromkeys((*expected, *DECIDING)):
        found, value = head.get(key), expected.get(key)
        if key in OPEN_LISTS and isinstance(found, list) and isinstance(value, list):
            found = [item for item in found if item in value]
        if _is_same(found, value):
            continue
        yield _first_difference(key, found, value)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal, and of the same types: true is not 1."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other)


def _first_difference(path: str, found: Any, expected: Any) -> str:
    """Where two values differ first, and what stands there."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in dict.fromkeys((*expected, *found)):
            if not _is_same(found.get(key), expected.get(key)):
                return _first_difference(f"{path}.{key}", found.get(key), expected.get(key))
    if isinstance(found, list) and isinstance(expected, list):
        for number, (one, other) in enumerate(zip(found, expected, strict=False)):
            if not _is_same(one, other):
                return _first_difference(f"{path}[{number}]", one, other)
        return f"{path} has {len(found)} entries, the manifest makes it {len(expected)}"
    return (
        f"{one_line(path, limit=80)} is {_short(found)}, the manifest makes it {_short(expected)}"
    )


def _additions(head: dict[str, Any], rendered: dict[str, Any]) -> list[str]:
    """A line on keys of the head that this program does not write."""
    added = [one_line(key, limit=40) for key in head if key not in (*rendered, *DECIDING)]
    if not added:
        return []
    return [
        f"{README}: its head has {', '.join(added[:5])}, which this program does not write there and nothing was compared with"
    ]


def _compare_body(
    directory: Path,
    manifest: dict[str, Any],
    curves: Curves | None,
    verification: dict[str, Any] | None,
    body: str,
    report: Report,
) -> None:
    """Say where the text below the head is not what would be written."""
    release = read_release(directory)
    if curves is None:
        return
    expected = render_body(manifest, curves=curves, verification=verification, release=release)
    if body.rstrip("\n") == expected.rstrip("\n"):
        return
    found, wanted = (text.rstrip("\n").split("\n") for text in (body, expected))
    pairs = enumerate(zip(found, wanted, strict=False))
    line = next((i for i, (one, other) in pairs if one != other), min(len(found), len(wanted)))
    there = _short(found[line]) if line < len(found) else "nothing"
    report.notices.append(
        f"{README}: the text below its head is not what this version makes of the manifest and the data (first at its line {line + 1}: "
        f"{there}); an owner or an older version may have written that, else {REMEDY}"
    )


def _check_picture(directory: Path, name: str, drawn: dict[str, bytes], report: Report) -> None:
    """Compare one with what would be drawn: nothing, where the data are not known."""
    try:
        content = _read(directory / name, MAX_PICTURE_BYTES)
        _check_drawing(content)
    except FileNotFoundError:
        report.notices.append(f"{name}: is missing, and the card shows it; {REMEDY}")
        return
    except (OSError, ValueError) as error:
        report.problems.append(f"{name}: {one_line(error, limit=200)}; {REMEDY}")
        return
    if drawn and content != drawn.get(name):
        report.notices.append(
            f"{name}: is not the picture that this version draws of the data; {REMEDY}"
        )


def _check_drawing(content: bytes) -> None:
    """See that a picture draws lines and text, and does nothing else: no scripts, links, styles, or things to fetch.

    Raises:
        ValueError: it does.
    """
    if b"<!" in content or b"<?" in content:
        raise ValueError(
            "holds declarations or instructions, which no picture of this program does"
        )
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise ValueError(f"is no SVG ({error})") from None
    for element in root.iter():
        name = str(element.tag).removeprefix("{http://www.w3.org/2000/svg}")
        if name not in _DRAWN:
            raise ValueError(f"holds <{name}>, which no picture of this program does")
        for key, value in element.attrib.items():
            if key.lower().startswith(("on", "{", "href", "style")) or not _STYLES.fullmatch(value):
                raise ValueError(f"has {key}={value!r}, which no picture of this program does")
            if "url(" in value.lower() or "script:" in value.lower():
                raise ValueError(f"has {key}={value!r}, which no picture of this program does")


def _read(path: Path, max_bytes: int) -> bytes:
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"has {size:,} bytes, more than {max_bytes:,}")
    return path.read_bytes()


def _short(value: Any) -> str:
    if value is None:
        return "not there"
    return one_line(value if isinstance(value, str) else repr(value), limit=80)
