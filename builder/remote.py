"""One dataset repository on the Hub: the few calls that publishing needs, each retried, each error one line.

huggingface_hub retries uploads and listings by itself, but neither commits nor branches nor tags. Those are retried here, which is
safe because each says what it starts from: after an answer was lost, the repository is looked at before anything is done again.

No message holds a URL, for the addresses to which files are sent are signed.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.client import responses
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    HfFileSystem,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

Result = TypeVar("Result")
Notice = Callable[[str], None]

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
WAIT_SECONDS = (1, 2, 4)
"""Before each new try of a call that huggingface_hub does not retry, unless the Hub says how long to wait."""
PATIENT_SECONDS = (*WAIT_SECONDS, 8, 16, 32, 64, 128, *[300] * 14)
"""The same for a build of days: it outlives more than an hour without the Hub, and what the Hub counts by the hour."""
FILES_PER_COMMIT = 50
"""The Hub asks for fewer than 100, and for no more than about 128 commits an hour."""
MAX_FILE_BYTES = 20 * 10**9
MAX_FILES = 10_000
"""Limits of the Hub, for a file and for the files of a folder."""
TRANSIENT = (408, 429)
"""And all from 500 on, of which some are known to what stands before the Hub only."""
UNREACHED = (httpx2.TransportError, ConnectionError, TimeoutError)
"""The last two are what hf_xet raises, with addresses in their text."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """What a path of the repository should hold."""

    content: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> Self:
        """A small file that is in memory."""
        return cls(content, len(content), hashlib.sha256(content).hexdigest())

    def blob_id(self) -> str:
        """Git's hash, by which the Hub names files that are not in large file storage; of a file that is gone, none."""
        if isinstance(self.content, Path) and not self.content.exists():
            return ""
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return str(sha.git_hash(content))


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What a path of the repository holds."""

    size: int
    blob_id: str
    sha256: str | None
    """None for a file that is not in large file storage."""

    def equals(self, local: LocalFile) -> bool:
        """Whether size and hash are those of a local file."""
        if self.size != local.size:
            return False
        return self.sha256 == local.sha256 if self.sha256 else self.blob_id == local.blob_id()


Tree = dict[str, RemoteFile]


def holds(tree: Tree, path: str, file: LocalFile) -> bool:
    """Whether a path of the repository has the size and hash of a local file."""
    return path in tree and tree[path].equals(file)


@dataclass(frozen=True, slots=True)
class Refs:
    """Names in a repository, each with its commit."""

    branches: dict[str, str]
    tags: dict[str, str]


def fetch(repo_id: str, revision: str, *files: str) -> Path:
    """The directory of a dataset on the Hub, in the cache.

    Args:
        repo_id: ORG/NAME.
        revision: a tag, branch or commit.
        files: which to fetch beside those that describe it, as patterns.

    Raises:
        ValueError: there is none that can be read, it has no such revision, or it is no logit dataset.
    """
    patterns = ["manifest.json", "README.md", "verification.json", "release.json", *files]
    try:
        directory = Path(
            snapshot_download(
                repo_id, repo_type="dataset", revision=revision, allow_patterns=patterns
            )
        )
    except RevisionNotFoundError:
        raise ValueError(f"dataset {repo_id!r} has no revision {revision!r} on the Hub") from None
    except (httpx2.HTTPError, OSError) as error:
        raise ValueError(
            f"there is no directory {repo_id!r}, and {explain(error, repo_id)}"
        ) from None
    if not (directory / "manifest.json").exists():
        raise ValueError(
            f"dataset {repo_id!r} on the Hub has no manifest.json: it is not a logit dataset"
        )
    return directory


class Repository:
    """A dataset repository that is written to."""

    def __init__(
        self, repo_id: str, notice: Notice, *, waits: Sequence[int] = WAIT_SECONDS
    ) -> None:
        """Look at nothing yet.

        Args:
            repo_id: ORG/NAME.
            notice: told, in a line, of retries.
            waits: seconds before each new try.
        """
        self.id = repo_id
        self._waits = waits
        self._api = HfApi()
        self._notice = notice

    def check_login(self) -> None:
        """See whether the Hub accepts the user's token.

        Raises:
            ValueError: there is none, or it is not accepted.
        """
        if get_token() is None:
            raise ValueError(
                "publishing needs a token; log in with `hf auth login`, or set HF_TOKEN"
            )
        self._try(lambda: self._api.whoami())

    def refs(self) -> Refs | None:
        """Branches and tags; None if there is no such repository."""
        try:
            refs = self._try(lambda: self._api.list_repo_refs(self.id, repo_type="dataset"))
        except _NoRepository:
            return None
        return Refs(
            {branch.name: branch.target_commit for branch in refs.branches},
            {tag.name: tag.target_commit for tag in refs.tags},
        )

    def is_private(self) -> bool:
        """Whether only some can see it."""
        return bool(self._try(lambda: self._api.dataset_info(self.id)).private)

    def tree(self, revision: str, paths: list[str] | None = None) -> Tree:
        """All files of a revision, or those of some paths that are there."""

        def attempt() -> list[Any]:
            where: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
            if paths is not None:
                return self._api.get_paths_info(self.id, paths, **where)
            return list(self._api.list_repo_tree(self.id, recursive=True, **where))

        entries = self._try(attempt)
        return {
            entry.path: RemoteFile(
                entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None
            )
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def download(self, path: str, revision: str) -> Path | None:
        """A file of a revision, in the cache; None if there is none."""
        try:
            return Path(
                self._try(
                    lambda: self._api.hf_hub_download(
                        self.id, path, repo_type="dataset", revision=revision
                    )
                )
            )
        except RemoteEntryNotFoundError:
            return None

    def open(self, path: str, revision: str) -> Any:
        """A file of a revision to read from anywhere in it, without fetching all of it."""
        return HfFileSystem().open(f"datasets/{self.id}@{revision}/{path}", "rb")

    def create(self, *, private: bool) -> None:
        """Make it, where it does not exist."""
        self._try(
            lambda: self._api.create_repo(
                self.id, repo_type="dataset", private=private or None, exist_ok=True
            )
        )

    def create_branch(self, branch: str, commit: str) -> str:
        """Make a branch, where it does not exist: its commit."""
        self._try(
            lambda: self._api.create_branch(
                self.id, repo_type="dataset", branch=branch, revision=commit, exist_ok=True
            )
        )
        return self.head(branch)

    def delete_branch(self, branch: str) -> None:
        """Remove a branch, if it is there."""

        def attempt() -> None:
            refs = self.refs()
            if refs and branch in refs.branches:
                self._api.delete_branch(self.id, repo_type="dataset", branch=branch)

        self._try(attempt)

    def send(self, addition: CommitOperationAdd, branch: str) -> None:
        """Send the content of a large file; a commit can bring it into the branch afterwards."""
        self._try(
            lambda: self._api.preupload_lfs_files(
                self.id, [addition], repo_type="dataset", revision=branch, free_memory=False
            )
        )

    def commit(
        self,
        branch: str,
        operations: Iterable[Any],
        *,
        message: str,
        parent: str,
        landed: Callable[[Tree], bool],
    ) -> str:
        """Make one commit on a branch that still stands at `parent`: its hash.

        Args:
            branch: to commit on.
            operations: huggingface_hub's.
            message: first line of the commit.
            parent: commit that the branch must be at.
            landed: whether the tree of another commit shows that this one was made, and only its answer lost.

        Raises:
            Moved: somebody else has moved the branch.
            ValueError: the Hub refuses. In both cases, nothing was changed.
        """
        operations = list(operations)

        def attempt() -> str:
            if (head := self.head(branch)) != parent:
                if landed(self.tree(head)):
                    return head
                raise Moved(
                    f"branch {branch} of {self.id} was moved by someone else in the meantime"
                )
            made = self._api.create_commit(
                self.id,
                operations,
                repo_type="dataset",
                revision=branch,
                commit_message=message,
                parent_commit=parent,
            )
            return str(made.oid)

        return self._try(attempt, retried=(*TRANSIENT, HTTPStatus.PRECONDITION_FAILED))

    def is_of_main(self, commit: str) -> bool:
        """Whether main stands at a commit, or once did."""
        commits = self._try(
            lambda: self._api.list_repo_commits(self.id, repo_type="dataset", revision="main")
        )
        return any(one.commit_id == commit for one in commits)

    def tag(self, tag: str, commit: str, *, message: str) -> None:
        """Name a commit.

        Raises:
            ValueError: the tag names another commit.
        """
        self._try(
            lambda: self._api.create_tag(
                self.id,
                repo_type="dataset",
                tag=tag,
                tag_message=message,
                revision=commit,
                exist_ok=True,
            )
        )
        if self.tagged(tag) != commit:
            raise ValueError(f"{tag} of {self.id} was set by someone else in the meantime")

    def tagged(self, tag: str) -> str:
        """The commit behind a tag."""
        return str(self._try(lambda: self._api.dataset_info(self.id, revision=tag)).sha)

    def head(self, branch: str) -> str:
        """The commit at which a branch stands."""
        refs = self.refs()
        if refs is None or branch not in refs.branches:
            raise ValueError(f"branch {branch} of {self.id} was deleted in the meantime")
        return refs.branches[branch]

    def _try(self, call: Callable[[], Result], *, retried: tuple[int, ...] = TRANSIENT) -> Result:
        for wait_seconds in (*self._waits, None):
            try:
                return call()
            except RemoteEntryNotFoundError:
                raise
            except (
                httpx2.HTTPError,
                LocalEntryNotFoundError,
                OfflineModeIsEnabled,
                RuntimeError,
                ConnectionError,
                TimeoutError,
            ) as error:
                cause = _cause(error)
                if wait_seconds is None or not _is_transient(cause, retried):
                    if isinstance(cause, RepositoryNotFoundError):
                        raise _NoRepository(explain(cause, self.id)) from None
                    raise ValueError(explain(cause, self.id)) from None
                wait_seconds = _retry_after(cause) or wait_seconds
                self._notice(f"{_symptom(cause)}: trying again in {wait_seconds} s")
                time.sleep(wait_seconds)
        raise AssertionError


class Moved(ValueError):
    """A branch is not where it was left."""


class _NoRepository(ValueError):
    """The repository does not exist, or must not be seen."""


def explain(error: BaseException, repo_id: str) -> str:
    """What went wrong between us and the Hub, and what to do, in one line without addresses."""
    status = _status(error)
    reason = ""
    if isinstance(error, HfHubHTTPError):
        said = (error.server_message or "").splitlines()
        reason = f" ({said[0][:200]})" if said and "://" not in said[0] else ""
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return "the Hub does not accept the token (has it expired?); log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no dataset {repo_id!r} that you can read; check the name, and log in if it is private"
    if isinstance(error, RevisionNotFoundError):
        return f"dataset {repo_id!r} has no such revision on the Hub"
    if status == 403:
        return f"the token may not write to {repo_id}{reason}; use a token with write access to it, or publish under another name"
    if status == 429:
        return "the Hub's rate limit is reached; wait some minutes"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, but this needs the Hub; unset it"
    if status is not None:
        phrase = f" {responses[status]}" if status in responses else ""
        return f"the Hub answers {status}{phrase}{reason}; try again later"
    if isinstance(error, (httpx2.HTTPError, LocalEntryNotFoundError, *UNREACHED)):
        return f"the Hub cannot be reached ({_symptom(error)}); check the network"
    return f"uploading failed ({type(error).__name__}); try again"


def _cause(error: BaseException) -> BaseException:
    """What lies under the RuntimeError into which huggingface_hub wraps a failed upload."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _is_transient(error: BaseException, retried: tuple[int, ...]) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in retried or status >= 500
    return isinstance(error, UNREACHED)


def _retry_after(error: BaseException) -> int | None:
    value = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""  # fmt: skip
    return int(value) if value.isdigit() else None


def _symptom(error: BaseException) -> str:
    status = _status(error)
    return f"the Hub answers {status}" if status else f"the connection failed ({type(error).__name__})"  # fmt: skip
