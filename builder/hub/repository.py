"""One dataset repository on the Hub: what it holds, and the few calls that change it."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    HfFileSystem,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

from builder.hub.calls import TRANSIENT, WAIT_SECONDS, Calls, NoRepository, Notice, explain


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
    """Fetch a dataset from the Hub into the cache, and return its directory.

    Args:
        repo_id: ORG/NAME.
        revision: a tag, branch or commit.
        files: patterns of files to fetch besides those that describe the dataset.

    Raises:
        ValueError: there is no readable dataset, no such revision, or the repository is no logit dataset.
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
        self._api = HfApi()
        self._call = Calls(repo_id, notice, waits)

    def check_login(self) -> None:
        """Check that the Hub accepts the user's token.

        Raises:
            ValueError: there is no token, or the Hub refuses it.
        """
        if get_token() is None:
            raise ValueError(
                "publishing needs a token; log in with `hf auth login`, or set HF_TOKEN"
            )
        self._call(lambda: self._api.whoami())

    def refs(self) -> Refs | None:
        """Return branches and tags; None if the repository does not exist."""
        try:
            refs = self._call(lambda: self._api.list_repo_refs(self.id, repo_type="dataset"))
        except NoRepository:
            return None
        return Refs(
            {branch.name: branch.target_commit for branch in refs.branches},
            {tag.name: tag.target_commit for tag in refs.tags},
        )

    def is_private(self) -> bool:
        """Return whether the repository is private."""
        return bool(self._call(lambda: self._api.dataset_info(self.id)).private)

    def tree(self, revision: str, paths: list[str] | None = None) -> Tree:
        """List all files of a revision, or those of the given paths that exist."""

        def attempt() -> list[Any]:
            where: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
            if paths is not None:
                return self._api.get_paths_info(self.id, paths, **where)
            return list(self._api.list_repo_tree(self.id, recursive=True, **where))

        entries = self._call(attempt)
        return {
            entry.path: RemoteFile(
                entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None
            )
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def download(self, path: str, revision: str) -> Path | None:
        """Download a file of a revision into the cache; None if it does not exist."""
        try:
            return Path(
                self._call(
                    lambda: self._api.hf_hub_download(
                        self.id, path, repo_type="dataset", revision=revision
                    )
                )
            )
        except RemoteEntryNotFoundError:
            return None

    def open(self, path: str, revision: str) -> Any:
        """Open a file of a revision for random access, without downloading all of it."""
        return HfFileSystem().open(f"datasets/{self.id}@{revision}/{path}", "rb")

    def create(self, *, private: bool) -> None:
        """Create the repository if it does not exist."""
        self._call(
            lambda: self._api.create_repo(
                self.id, repo_type="dataset", private=private or None, exist_ok=True
            )
        )

    def create_branch(self, branch: str, commit: str) -> str:
        """Create a branch if it does not exist, and return its commit."""
        self._call(
            lambda: self._api.create_branch(
                self.id, repo_type="dataset", branch=branch, revision=commit, exist_ok=True
            )
        )
        return self.head(branch)

    def delete_branch(self, branch: str) -> None:
        """Delete a branch if it exists."""

        def attempt() -> None:
            refs = self.refs()
            if refs and branch in refs.branches:
                self._api.delete_branch(self.id, repo_type="dataset", branch=branch)

        self._call(attempt)

    def send(self, addition: CommitOperationAdd, branch: str) -> None:
        """Upload the content of a large file; a commit can add it to the branch later."""
        self._call(
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
        """Make one commit on a branch that is still at `parent`, and return its hash.

        Args:
            branch: to commit on.
            operations: huggingface_hub's.
            message: first line of the commit message.
            parent: commit that the branch must be at.
            landed: whether the tree of another commit shows that this one was made and only its answer was lost.

        Raises:
            Moved: somebody else moved the branch.
            ValueError: the Hub refuses. In both cases, nothing changes.
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

        return self._call(attempt, retried=(*TRANSIENT, HTTPStatus.PRECONDITION_FAILED))

    def is_of_main(self, commit: str) -> bool:
        """Whether main stands at a commit, or once did."""
        commits = self._call(
            lambda: self._api.list_repo_commits(self.id, repo_type="dataset", revision="main")
        )
        return any(one.commit_id == commit for one in commits)

    def tag(self, tag: str, commit: str, *, message: str) -> None:
        """Tag a commit.

        Raises:
            ValueError: the tag already names another commit.
        """
        self._call(
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
        """Return the commit behind a tag."""
        return str(self._call(lambda: self._api.dataset_info(self.id, revision=tag)).sha)

    def head(self, branch: str) -> str:
        """Return the commit that a branch is at."""
        refs = self.refs()
        if refs is None or branch not in refs.branches:
            raise ValueError(f"branch {branch} of {self.id} was deleted in the meantime")
        return refs.branches[branch]


class Moved(ValueError):
    """A branch is not where it was left."""
