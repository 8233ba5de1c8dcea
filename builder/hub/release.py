"""A finished build and a repository on the Hub → what publishing the one to the other would do, without doing anything."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from builder.card.card import PICTURES, README, card_files
from builder.card.licences import licences
from builder.card.records import RELEASE, VERIFICATION, read_json, read_release, read_verification
from builder.dataset.manifest import FILE_NAME, data_digest, json_bytes, read_manifest, records_of
from builder.dataset.printable import counted
from builder.hub.calls import WAIT_SECONDS, Notice
from builder.hub.limits import MAX_FILE_BYTES, MAX_FILES, REPO_ID
from builder.hub.repository import LocalFile, Repository, Tree, holds
from builder.hub.versions import Step, Version, choose, compare
from logit_dataset.schema import HEAD_FILE, SPLITS

MAX_MESSAGE = 500

_OURS = re.compile(rf"data/({'|'.join(SPLITS)})-[\w.-]+\.parquet", re.ASCII)
_UNTOUCHED = (".gitattributes", README, "LICENSE", "LICENSE.md", "LICENSE.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What publishing a directory would do; making it changes nothing."""

    repo: Repository
    directory: Path
    manifest: dict[str, Any]
    version: Version
    former: Version | None
    reasons: list[str]
    """Of the step from the former version."""
    release: dict[str, Any]
    """For the card: repo, version and changelog."""
    private: bool
    main: str | None
    """Commit of main; None where the repository does not exist."""
    remote: Tree
    """What main holds."""
    branch: str
    """Where the files are gathered."""
    gathered: tuple[str, Tree] | None = None
    """The commit at which that branch stands, and what it holds, if it is there already."""
    is_published: bool = False
    """Whether the tag is there already, with just these files."""

    def files(self) -> dict[str, LocalFile]:
        """All that the repository will hold: the manifest's files, the manifest itself, and what is said about them."""
        return local_files(self.directory, self.manifest, self.release)

    def elsewhere(self) -> dict[str, str]:
        """Data files that are not in the directory but in the repository, just as the manifest says: path → commit."""
        commits = [self.gathered, (self.main, self.remote) if self.main else None]
        found: dict[str, str] = {}
        for record in records_of(self.manifest):
            if (self.directory / record.file).exists():
                continue
            for commit, tree in filter(None, commits):
                there = tree.get(record.file)
                if there and (there.sha256, there.size) == (record.sha256, record.bytes):
                    found.setdefault(record.file, commit)
        return found

    def to_send(self, files: dict[str, LocalFile]) -> list[str]:
        """Of those, the ones that main does not hold."""
        return [path for path, file in files.items() if not holds(self.remote, path, file)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A repository to which a dataset may be published, as far as its recipe and the user's wishes tell."""

    repo: Repository
    branches: dict[str, str]
    taken: set[str]
    """All tags."""
    former: Version | None
    """The highest version among them."""
    remote: Tree
    """What main holds."""

    def former_manifest(self) -> dict[str, Any] | None:
        """The manifest of the highest version, if there is one that can be read."""
        path = self.former and self.repo.download(FILE_NAME, self.former.tag)
        try:
            return read_manifest(path.parent) if path else None
        except ValueError:
            return None


def look_at(
    repo_id: str,
    recipe: dict[str, Any],
    *,
    private: bool,
    message: str,
    notice: Notice,
    waits: Sequence[int] = WAIT_SECONDS,
) -> Destination:
    """Ask the Hub what is there, and refuse what cannot be published there however it is built. Changes nothing.

    Args:
        repo_id: ORG/NAME.
        recipe: plain values of the recipe to publish.
        private: whether a new repository is private.
        message: a line for the changelog.
        notice: called with one line per retry.
        waits: seconds before each retry.

    Raises:
        ValueError: the dataset cannot be published as asked; the message says why.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is not a Hub dataset name; expected ORG/NAME")
    if len(message) > MAX_MESSAGE:
        raise ValueError(
            f"--message has {len(message)} characters, expected at most {MAX_MESSAGE}; shorten it"
        )
    _check_licences(recipe)
    repo = Repository(repo_id, notice, waits=waits)
    refs = repo.refs()
    branches, taken = (refs.branches, set(refs.tags)) if refs else ({}, set())
    versions = sorted(filter(None, map(Version.parse, taken)))
    former = versions[-1] if versions else None
    remote = repo.tree(branches["main"]) if "main" in branches else {}
    _check_repository(repo, private, exists=refs is not None, former=former, remote=remote)
    return Destination(repo=repo, branches=branches, taken=taken, former=former, remote=remote)


def prepare(
    repo_id: str,
    directory: Path,
    *,
    tag: str | None = None,
    private: bool = False,
    message: str | None = None,
    branch: str | None = None,
    notice: Notice,
    waits: Sequence[int] = WAIT_SECONDS,
) -> Plan:
    """Plan a publication. Asks the Hub and changes nothing.

    Args:
        repo_id: ORG/NAME.
        directory: of a finished build.
        tag: a version like v1.2.3; None for the next one.
        private: whether a new repository is private.
        message: a line for the changelog.
        branch: where files are gathered, now or earlier; None for the branch of the version.
        notice: called with one line per retry.
        waits: seconds before each retry, while planning and while publishing.

    Raises:
        ValueError: the dataset cannot be published as asked; the message says why, and what can be.
    """
    message = " ".join((message or "").split())
    manifest = read_manifest(directory)
    there = look_at(
        repo_id, manifest["recipe"], private=private, message=message, notice=notice, waits=waits
    )
    _check_limits(manifest)
    repo, former, main = there.repo, there.former, there.branches.get("main")

    known = _known_release(directory, manifest, repo_id, message)
    if known and former and known["version"] == str(former) and tag in (None, former.tag):
        tagged = repo.tree(former.tag)
        files = local_files(directory, manifest, known)
        if all(holds(tagged, path, file) for path, file in files.items()):
            return Plan(
                repo=repo, directory=directory, manifest=manifest, version=former, former=former, reasons=[],
                release=known, private=private, main=main, remote=there.remote, is_published=True,
                branch=branch or _branch(former),
            )  # fmt: skip
    step, reasons, changelog = _since(repo, former, manifest)
    version = choose(tag, there.taken, former, step, reasons)
    release = known if known and known["version"] == str(version) else None
    if release is None or release["changelog"][1:] != changelog:
        changes = [*([message] if message else []), *reasons]
        today = datetime.now(UTC).date().isoformat()
        entry = {"version": str(version), "date": today, "changes": changes}
        release = {
            "repo": repo_id,
            "version": str(version),
            "data": data_digest(manifest),
            "message": message,
            "changelog": [entry, *changelog],
        }
    branch = branch or _branch(version)
    head = there.branches.get(branch)
    return Plan(
        repo=repo, directory=directory, manifest=manifest, version=version, former=former, reasons=reasons,
        release=release, private=private, main=main, remote=there.remote, branch=branch,
        gathered=(head, repo.tree(head)) if head else None,
    )  # fmt: skip


def _branch(version: Version) -> str:
    return f"publish-{version.tag}"


def describe(plan: Plan, *, with_card: bool = False) -> str:
    """Describe in plain text what publishing would send and change."""
    if plan.is_published:
        return f"{plan.repo.id} {plan.version.tag} is published already"
    files = plan.files()
    sent = set(plan.to_send(files))
    lines = [
        f"{plan.repo.id} {plan.version.tag}, {f'after {plan.former.tag}' if plan.former else 'the first version'}: "
        f"{'; '.join(plan.reasons)}"
    ]
    for path, file in sorted(files.items()):
        lines.append(f"{file.size:>14,}  {'send' if path in sent else 'keep'}    {path}")
    lines += [f"{'':>14}  delete  {path}" for path in stale(plan.remote, files)]
    size = sum(files[path].size for path in sent)
    lines.append(f"{size:>14,}  bytes to send, in {len(sent)} of {counted(len(files), 'file')}")
    if with_card:
        content = files[README].content
        assert isinstance(content, bytes)
        lines += ["", content.decode()]
    return "\n".join(lines)


def local_files(
    directory: Path, manifest: dict[str, Any], release: dict[str, Any]
) -> dict[str, LocalFile]:
    """Path in the repository → what it should hold. Nothing else of the directory is ever sent."""
    small = {
        FILE_NAME: (directory / FILE_NAME).read_bytes(),
        RELEASE: json_bytes(release),
        **card_files(directory, manifest, release=release),
    }
    if verification := read_verification(directory, manifest):
        small[VERIFICATION] = json_bytes(verification)
    files = {path: LocalFile.of(content) for path, content in small.items()}
    if head := manifest.get("teacher_head"):
        files[HEAD_FILE] = LocalFile(directory / HEAD_FILE, head["bytes"], head["sha256"])
    for record in records_of(manifest):
        files[record.file] = LocalFile(directory / record.file, record.bytes, record.sha256)
    return files


def stale(tree: Tree, files: dict[str, LocalFile]) -> list[str]:
    """Files of an earlier version that are gone from this one. Files that are not ours stay."""
    ours = {README, FILE_NAME, RELEASE, VERIFICATION, HEAD_FILE, *PICTURES}
    return [path for path in tree if path not in files and (path in ours or _OURS.fullmatch(path))]


def _check_licences(recipe: dict[str, Any]) -> None:
    stated = licences({"recipe": recipe})
    missing = [f"{section}.license" for section, name in stated.items() if not name]
    if missing:
        raise ValueError(
            f"the recipe does not state {' and '.join(missing)}, and nobody may use a dataset without a licence; add {'it' if len(missing) == 1 else 'them'} to the "
            "recipe and run the build command again (it rewrites only the description)"
        )


def _check_limits(manifest: dict[str, Any]) -> None:
    records = records_of(manifest)
    largest = max(records, key=lambda record: record.bytes)
    if largest.bytes > MAX_FILE_BYTES or len(records) > MAX_FILES:
        raise ValueError(
            f"the dataset has {len(records):,} files of up to {largest.bytes / 1e9:.1f} GB, but the Hub takes {MAX_FILES:,} of up "
            f"to {MAX_FILE_BYTES / 1e9:.0f} GB; build it with another output.shard_tokens"
        )


def _check_repository(
    repo: Repository, private: bool, *, exists: bool, former: Version | None, remote: Tree
) -> None:
    if exists and private and not repo.is_private():
        raise ValueError(
            f"{repo.id} exists and is public, so --private has no effect; make it private in its settings, or publish "
            "under another name"
        )
    foreign = [path for path in remote if path not in _UNTOUCHED]
    if foreign and former is None and FILE_NAME not in remote:
        raise ValueError(
            f"{repo.id} holds something other than a logit dataset ({', '.join(sorted(foreign)[:3])}); publish under another name"
        )


def _known_release(
    directory: Path, manifest: dict[str, Any], repo_id: str, message: str
) -> dict[str, Any] | None:
    """What an earlier run of the same command wrote down, so that its card has the same bytes on another day."""
    release = read_release(directory)
    asked = {"repo": repo_id, "data": data_digest(manifest), "message": message}
    return release if release and {key: release.get(key) for key in asked} == asked else None


def _since(
    repo: Repository, former: Version | None, manifest: dict[str, Any]
) -> tuple[Step, list[str], list[dict[str, Any]]]:
    """The step from the former version, its reasons, and the changelog so far."""
    totals = manifest["totals"]
    if former is None:
        reason = f"{counted(totals['tokens'], 'token')} in {counted(totals['rows'], 'row')}"
        return "major", [reason], []
    manifest_path = repo.download(FILE_NAME, former.tag)
    release_path = repo.download(RELEASE, former.tag)
    changelog = _changelog(read_json(release_path)) if release_path else []
    if manifest_path is None:
        return "major", [f"{former.tag} has no {FILE_NAME}"], changelog
    try:
        old = read_manifest(manifest_path.parent)
    except ValueError:
        return "major", [f"the manifest of {former.tag} has another schema"], changelog
    return *compare(old, manifest), changelog


def _changelog(release: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The entries of a release.json that came from the Hub, as far as they are entries."""
    return [
        {
            "version": str(entry["version"]),
            "date": str(entry["date"]),
            "changes": [str(line) for line in entry["changes"]],
        }
        for entry in (release or {}).get("changelog", [])
        if isinstance(entry, dict) and entry.keys() >= {"version", "date", "changes"}
    ]
