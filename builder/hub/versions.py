"""Two manifests → how large a step lies between their versions.

patch  the same data files: only the card or what is said about the data has changed
minor  more rows, and every row that was there is what it was
major  anything else: another teacher, tokenizer, top_k, schema or corpus, other or fewer rows
"""

import re
from typing import Any, Literal, NamedTuple, Self

from builder.dataset.identity import deciding_rows, differences
from builder.dataset.manifest import ShardRecord, records_of
from builder.dataset.printable import counted
from logit_dataset.schema import SCHEMA_VERSION

Step = Literal["patch", "minor", "major"]
MEANING = {
    "patch": "the data are the same",
    "minor": "rows were added",
    "major": "readers may break, or rows have changed",
}


class Version(NamedTuple):
    """A semantic version; the tag is `v1.2.3`."""

    major: int
    minor: int
    patch: int

    @classmethod
    def parse(cls, tag: str) -> Self | None:
        """The version behind a tag; None for any other name."""
        match = re.fullmatch(r"v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", tag, flags=re.ASCII)
        return cls(*map(int, match.groups())) if match else None

    def next(self, step: Step) -> "Version":
        """The version that a step leads to."""
        if step == "patch":
            return self._replace(patch=self.patch + 1)
        if step == "minor":
            return Version(self.major, self.minor + 1, 0)
        return Version(self.major + 1, 0, 0)

    @property
    def tag(self) -> str:
        """Its name on the Hub."""
        return f"v{self}"

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


FIRST = Version(1, 0, 0)


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[Step, list[str]]:
    """The step from one manifest to another, and one line for each reason."""
    old_records, new_records = records_of(old), records_of(new)
    files = [[(record.file, record.sha256) for record in r] for r in (old_records, new_records)]
    if files[0] == files[1]:
        return "patch", ["the data files are the same"]
    changes = differences(_row_deciding(old), _row_deciding(new)) or _lost(old_records, new_records)
    if changes:
        return "major", changes
    added = new["totals"]["rows"] - old["totals"]["rows"]
    return "minor", [
        f"{counted(added, 'row')} {'was' if added == 1 else 'were'} added, the others are the same"
    ]


def least_step(old: dict[str, Any], plan: dict[str, Any]) -> tuple[Step, list[str]]:
    """The least step from a manifest to any that a plan can lead to, and one line for each reason.

    Args:
        old: the manifest.
        plan: recipe, and the sources of corpus and teacher.
    """
    teacher = {**old["teacher"], **plan["teacher"]}  # what the loaded one will add is not known
    new = {**plan, "teacher": teacher, "schema_version": SCHEMA_VERSION}
    changes = differences(_row_deciding(old), _row_deciding(new))
    limit, documents = plan["recipe"]["corpus"]["max_documents"], old["totals"]["documents"]
    if limit and limit < documents:
        changes.append(f"{counted(documents - limit, 'document')} fewer")
    return ("major", changes) if changes else ("patch", [])


def choose(
    wanted: str | None, taken: set[str], latest: Version | None, step: Step, reasons: list[str]
) -> Version:
    """The version to publish.

    Args:
        wanted: the tag that was asked for; None for the next one.
        taken: all tags of the repository.
        latest: the highest version among them; None for a first version.
        step: from the latest version to the new one.
        reasons: of the step, for the message.

    Raises:
        ValueError: the tag is not a version, is taken, or is too small for the step; suggests one that is free.
    """
    lowest = latest.next(step) if latest else FIRST
    while lowest.tag in taken:
        lowest = lowest.next("patch")
    if wanted is None:
        return lowest
    version = Version.parse(wanted)
    if version is None:
        raise ValueError(f"{wanted!r} is not a version like v1.2.3; use --tag {lowest.tag}")
    if wanted in taken:
        raise ValueError(
            f"{wanted} is published already, and a published version is never changed; "
            f"the next free one is --tag {lowest.tag}"
        )
    if latest and version < latest.next(step):
        raise ValueError(
            f"{wanted} is too small a step from {latest.tag}: {MEANING[step]} ({'; '.join(reasons[:3])}), "
            f"which needs a new {step} version; use --tag {lowest.tag}"
        )
    return version


def _row_deciding(manifest: dict[str, Any]) -> dict[str, Any]:
    """What decides the content of each row and how it is stored."""
    keys = ("recipe", "corpus", "teacher", "schema_version")
    return deciding_rows({key: manifest[key] for key in keys})


def _lost(old: list[ShardRecord], new: list[ShardRecord]) -> list[str]:
    """Files whose rows are not all there any more, one line each.

    Only a partition's last file may differ: it ended where the corpus or its limit did, and now goes on. Its first rows
    are the same where hardware and libraries are.
    """
    now = {record.file: record for record in new}
    lines = []
    for record in old:
        found = now.get(record.file)
        if found is None:
            lines.append(f"{record.file} is gone")
        elif found.rows < record.rows:
            lines.append(f"{record.file} has {counted(record.rows - found.rows, 'row')} fewer")
        elif found.sha256 != record.sha256:
            if not (record.exhausted and found.rows > record.rows):
                lines.append(f"{record.file} has other content")
            elif changes := differences(record.environment, found.environment):
                lines.append(
                    f"{record.file} was computed again, differently ({'; '.join(changes)})"
                )
    return lines
