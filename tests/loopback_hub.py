"""A loopback stand-in of the Hugging Face Hub, over real HTTP, for the unmodified client libraries.

Repositories are in memory: a commit is a mapping of paths to contents, a branch or a tag is the name of a commit. It answers
what huggingface_hub, transformers and datasets ask when they read (repo info, tree, paths-info, refs, and resolve with
ranges) and when they publish (repos, branches, commits, tags, and large files in one or several parts). A test changes
it by calling `commit` and `tag`, makes it fail by adding to `faults` and `losses`, and reads what happened from `requests` and
`arrived`.

A client has to be a process of its own, with the environment that `environment` gives: HF_ENDPOINT is read at import. Since
the imports take seconds, `Client` keeps such a process and forks it for each command.
"""

import base64
import hashlib
import importlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]

DATE = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".parquet", ".safetensors", ".gguf", ".bin", ".zst", ".gz")
TOKEN = "hf_planted_secret"
USER = "planted-user"
WRITABLE = ("org",)
"""Namespaces that the token may write to."""
LICENSES = (
    "apache-2.0",
    "mit",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-3.0",
    "cc-by-sa-4.0",
    "odc-by",
    "other",
)
"""As far as tests need them."""
COMMAND_SECONDS = 120
"""After which a command of a Client is ended."""


@dataclass(slots=True)
class Repo:
    """One repository, with all its commits."""

    kind: str
    """`model` or `dataset`."""
    id: str
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False
    parents: dict[str, str] = field(default_factory=dict)
    """Commit → the one before it."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files that have arrived, by the hash under which they were announced."""
    messages: dict[str, str] = field(default_factory=dict)
    """Commit → its first line, of commits made over HTTP."""

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag, full or abbreviated commit names."""
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            return next((sha for sha in self.commits if sha.startswith(revision)), None)
        return None


class Large(bytes):
    """Content of a file in large file storage, with the hash that its pointer in git states."""

    oid: str


class Cut(Exception):
    """Raised by a fault or a loss: the connection is reset."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Returned by a fault: an answer with headers."""

    status: int
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    """With the query."""
    authorization: str | None
    range: str | None


class Hub:
    """The repositories, and the log of what was asked. Use `serve()` to get a running one."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Callable[[Request], int | Refusal | None]] = []
        """Each may answer a request with an HTTP status of its own, or cut it off, before it has any effect."""
        self.losses: list[Callable[[Request], None]] = []
        """Each may cut off a request after it has had its effect, so that the answer is lost."""
        self.arrived: list[str] = []
        """Hashes of large files, each time that one has arrived whole."""
        self.damage: list[Callable[[bytes], bytes]] = []
        """Taken one by one: what becomes of a large file on its way."""
        self.part_bytes: int | None = None
        """Larger files have to come in parts of this size."""
        self.is_token_valid = True
        self.lock = Lock()
        self.connections = 0
        """That are open."""
        self._serial = 0
        self.endpoint = ""

    def commit(
        self, kind: str, repo_id: str, files: Files, *, branch: str = "main", private: bool = False
    ) -> str:
        """Make these files the whole content of a branch; the repo and the branch come into being when needed."""
        repo = self.repos.setdefault((kind, repo_id), Repo(kind, repo_id, private=private))
        parent = repo.branches.get(branch, "")
        self._serial += 1  # no two commits are the same, as their times ensure elsewhere
        digest = hashlib.sha1(f"{kind} {repo_id} {parent} {self._serial}".encode())
        for path, content in sorted(files.items()):
            digest.update(f"{path} {blob_id(content)}\n".encode())
        sha = digest.hexdigest()
        repo.commits[sha] = dict(files)
        repo.parents[sha] = parent
        repo.branches[branch] = sha
        return sha

    def settle(self) -> None:
        """Wait until what a killed client had still sent has been taken."""
        deadline = time.monotonic() + 10
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.002)

    def tag(self, kind: str, repo_id: str, name: str, revision: str = "main") -> str:
        """Name a commit."""
        repo = self.repos[kind, repo_id]
        sha = repo.resolve(revision)
        assert sha
        repo.tags[name] = sha
        return sha


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub that listens on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients that are killed in the middle of an answer
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """Environment of a client process that knows this Hub only, and keeps its cache in `home`."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def directory_files(directory: Path, prefix: str = "") -> Files:
    """The files below a directory, as the content of a commit."""
    return {
        prefix + path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def blob_id(content: bytes) -> str:
    """Git's id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _HubError(Exception):
    def __init__(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    server_version = "hub-stand-in"
    disable_nagle_algorithm = (
        True  # else each answer waits 40 ms for the client's acknowledgement of its head
    )

    def setup(self) -> None:
        with self.hub.lock:
            self.hub.connections += 1
        super().setup()

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            with self.hub.lock:
                self.hub.connections -= 1

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Tests read `hub.requests` instead."""

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.request_seen = request = Request(
            self.command, self.path, self.headers["Authorization"], self.headers["Range"]
        )
        with self.hub.lock:
            self.hub.requests.append(request)
        body = None
        try:
            answers = [answer for fault in self.hub.faults if (answer := fault(request))]
            body = self.rfile.read(length)
            if len(body) < length:
                raise Cut  # the client is gone
            for answer in answers:
                if isinstance(answer, int):
                    answer = Refusal(answer, {})
                phrase = responses.get(answer.status, "")
                raise _HubError(answer.status, "", phrase, answer.headers)
            if self.headers["Authorization"] and not self.hub.is_token_valid:
                raise _HubError(401, "", "Invalid credentials in Authorization header")
            self._route(body)
        except _HubError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            headers |= {"X-Error-Message": error.message, **error.headers}
            self._send_json({"error": error.message}, status=error.status, headers=headers)
        except Cut:
            if body is None and length:
                self.rfile.read1(length // 2)
            self.close_connection = True
            # Closing without the usual handshake: the client sees a reset, not an end.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def _route(self, body: bytes) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if match := re.fullmatch(
            r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.+))?)?)?", url.path
        ):
            kind, repo_id, action, revision, path = (
                part and unquote(part) for part in match.groups()
            )
            repo = self._repo(kind, repo_id)
            revision, path = revision or "main", (path or "").strip("/")
            if action == "paths-info":
                self._send_json(self._paths_info(repo, revision, self._form(body)))
            elif self.command in ("POST", "DELETE"):
                self._may_write(repo_id)
                with self.hub.lock:
                    answer = self._change(repo, action, revision, body)
                self._send_json(answer)
            elif action in (None, "revision"):
                self._send_json(self._info(repo, revision, with_blobs="blobs" in query))
            elif action == "tree":
                recursive = query.get("recursive", "").lower() in ("1", "true")
                self._send_json(self._tree(repo, revision, path, recursive=recursive))
            elif action == "refs":
                self._send_json(self._refs(repo))
            elif action == "commits":
                sha, _ = self._content(repo, revision)
                history = []
                while sha:
                    history.append(sha)
                    sha = repo.parents[sha]
                about = {"title": "", "message": "", "authors": [], "date": DATE}
                self._send_json([{"id": sha, **about} for sha in history])
            else:
                raise _HubError(404, "", f"no such route: {url.path}")
        elif match := re.fullmatch(
            r"/(datasets/)?([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)", url.path
        ):
            prefix, repo_id, revision, path = (part and unquote(part) for part in match.groups())
            self._send_file(self._repo("dataset" if prefix else "model", repo_id), revision, path)
        elif match := re.fullmatch(
            r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", url.path
        ):
            self._may_write(match[1])
            self._send_json(self._batch(self._repo("dataset", match[1]), json.loads(body)))
        elif match := re.fullmatch(
            r"/storage/([^/]+/[^/]+)/(put|parts|verify)/([0-9a-f]+)", url.path
        ):
            with self.hub.lock:
                self._store(self.hub.repos["dataset", match[1]], match[2], match[3], query, body)
        elif url.path == "/api/whoami-v2":
            self._may_write(f"{WRITABLE[0]}/")
            self._send_json({"name": USER, "orgs": [{"name": name} for name in WRITABLE]})
        elif url.path == "/api/validate-yaml":
            errors = card_errors(json.loads(body)["content"])
            listed = [{"message": message} for message in errors]
            self._send_json({"errors": listed, "warnings": []}, status=400 if errors else 200)
        elif url.path == "/api/repos/create":
            self._create(json.loads(body))
        else:
            raise _HubError(404, "", f"no such route: {url.path}")

    def _may_write(self, repo_id: str) -> None:
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            raise _HubError(401, "", "Invalid username or password.")
        if repo_id.split("/")[0] not in WRITABLE:
            raise _HubError(403, "", "you don't have the rights to write to this namespace")

    def _create(self, wanted: dict[str, Any]) -> None:
        kind, repo_id = wanted["type"], f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{kind}s/{repo_id}"}
        self._may_write(repo_id)
        if (kind, repo_id) in self.hub.repos:
            self._send_json({**answer, "error": "You already created this repo"}, status=409)
            return
        files = {".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"}
        private = wanted.get("visibility") == "private"
        self.hub.commit(kind, repo_id, files, private=private)
        self._send_json(answer)

    def _change(self, repo: Repo, action: str, name: str, body: bytes) -> dict[str, Any]:
        names = {"branch": repo.branches, "tag": repo.tags}.get(action)
        if action == "preupload":
            return self._preupload(repo, name, json.loads(body)["files"])
        if action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            return self._commit(repo, name, lines)
        if names is None:
            raise _HubError(404, "", f"no such route: {self.path}")
        if self.command == "DELETE":
            if names.pop(name, None) is None:
                raise _HubError(404, "RevisionNotFound", f"no such {action}: {name}")
            return {}
        wanted = json.loads(body)
        name, start = (
            (name, wanted["startingPoint"]) if action == "branch" else (wanted["tag"], name)
        )
        if name in names:
            raise _HubError(409, "", f"{action} {name} exists already")
        names[name], _ = self._content(repo, start)
        return {}

    def _preupload(self, repo: Repo, revision: str, wanted: list[dict[str, Any]]) -> dict[str, Any]:
        _, files = self._content(repo, revision)
        answers = []
        for file in wanted:
            path = file["path"]
            answer = {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            if path in files:
                answer["oid"] = _etag(path, files[path])
            answers.append(answer)
        return {"files": answers}

    def _batch(self, repo: Repo, wanted: dict[str, Any]) -> dict[str, Any]:
        storage = f"{self.hub.endpoint}/storage/{repo.id}"
        objects = []
        for file in wanted["objects"]:
            oid, size = file["oid"], file["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            # As the real one, which does not believe that a damaged file has arrived.
            if hashlib.sha256(repo.objects.get(oid, b"")).hexdigest() != oid:
                upload: dict[str, Any] = {"href": f"{storage}/put/{oid}"}
                if self.hub.part_bytes and size > self.hub.part_bytes:
                    count = -(-size // self.hub.part_bytes)
                    upload["href"] = f"{storage}/parts/{oid}?count={count}"
                    urls = {str(n): f"{storage}/parts/{oid}?part={n}" for n in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(self.hub.part_bytes), **urls}
                verify = {"href": f"{storage}/verify/{oid}"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return {"objects": objects, "transfer": "basic"}

    def _store(self, repo: Repo, action: str, oid: str, query: dict[str, str], body: bytes) -> None:
        """Take a large file, or a part of one, or put its parts together, or say whether it is there."""
        if action == "verify":
            if len(repo.objects.get(oid, b"")) != json.loads(body)["size"]:
                raise _HubError(404, "", "not found")
        elif "part" in query:
            repo.objects[f"{oid} {query['part']}"] = body
        else:
            if "count" in query:
                parts = range(1, int(query["count"]) + 1)
                body = b"".join(repo.objects.pop(f"{oid} {part}") for part in parts)
            if self.hub.damage:
                body = self.hub.damage.pop()(body)
            repo.objects[oid] = body
            self.hub.arrived.append(oid)
        self._send(b"", status=200, headers={"ETag": f'"{len(body)}"'})

    def _commit(self, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        head, files = self._content(repo, branch)
        header = lines[0]["value"]
        if header.get("parentCommit", head) != head:
            raise _HubError(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise _HubError(400, "", f"{path} points to a file that has not arrived")
                files[path] = Large(repo.objects[value["oid"]])
                files[path].oid = value["oid"]
            elif line["key"] == "deletedFile":
                if files.pop(path, None) is None:
                    raise _HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                raise _HubError(400, "", f"unknown operation {line['key']}")
        sha = self.hub.commit(repo.kind, repo.id, files, branch=branch)
        repo.messages[sha] = header["summary"]
        url = f"{self.hub.endpoint}/{repo.kind}s/{repo.id}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url}

    def _repo(self, kind: str, repo_id: str) -> Repo:
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and not self.headers["Authorization"]):
            # As the real one, which does not tell strangers what exists.
            status = 404 if self.headers["Authorization"] else 401
            raise _HubError(status, "RepoNotFound", "Repository not found")
        return repo

    def _content(self, repo: Repo, revision: str) -> tuple[str, Files]:
        sha = repo.resolve(revision)
        if sha is None:
            raise _HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    def _form(self, body: bytes) -> list[str]:
        if "json" in (self.headers["Content-Type"] or ""):
            paths = json.loads(body)["paths"]
            return [paths] if isinstance(paths, str) else paths
        return parse_qs(body.decode())["paths"]

    def _info(self, repo: Repo, revision: str, *, with_blobs: bool) -> dict[str, Any]:
        sha, files = self._content(repo, revision)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(files)]
        if with_blobs:
            for sibling in siblings:
                entry = _entry(sibling["rfilename"], files)
                sibling |= {"blobId": entry["oid"], "size": entry["size"]}
                if lfs := entry.get("lfs"):
                    sibling["lfs"] = {**lfs, "sha256": lfs["oid"]}
        return {
            "_id": sha[:24],
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": sha,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": DATE,
            "createdAt": DATE,
            "siblings": siblings,
            **({"modelId": repo.id} if repo.kind == "model" else {}),
        }

    def _refs(self, repo: Repo) -> dict[str, Any]:
        def listed(names: dict[str, str], where: str) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{where}/{name}", "targetCommit": sha}
                for name, sha in names.items()
            ]

        return {
            "branches": listed(repo.branches, "heads"),
            "tags": listed(repo.tags, "tags"),
            "converts": [],
        }

    def _tree(
        self, repo: Repo, revision: str, path: str, *, recursive: bool
    ) -> list[dict[str, Any]]:
        _, files = self._content(repo, revision)
        below = f"{path}/" if path else ""
        names = [name for name in files if name.startswith(below)]
        if not names and path:
            raise _HubError(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
        folders = {
            name[:end]
            for name in names
            for end in (i for i, c in enumerate(name) if c == "/" and i >= len(below))
        }
        entries = [_entry(name, files) for name in sorted({*names, *folders})]
        return [e for e in entries if recursive or "/" not in e["path"].removeprefix(below)]

    def _paths_info(self, repo: Repo, revision: str, paths: list[str]) -> list[dict[str, Any]]:
        _, files = self._content(repo, revision)
        names = [path.strip("/") for path in paths]
        return [
            _entry(name, files)
            for name in names
            if name in files or any(other.startswith(f"{name}/") for other in files)
        ]

    def _send_file(self, repo: Repo, revision: str, path: str) -> None:
        sha, files = self._content(repo, revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path not in files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._send(b"Entry not found", status=404, headers=headers)
            return
        content = files[path]
        headers["ETag"] = f'"{_etag(path, content)}"'
        if path.endswith(LFS_SUFFIXES):
            headers["X-Linked-Size"] = str(len(content))
            headers["X-Linked-Etag"] = headers["ETag"]
        status = 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or ""):
            first, last = match.groups()
            start = int(first) if first else max(0, len(content) - int(last))
            end = min(int(last) + 1, len(content)) if first and last else len(content)
            if start >= end:
                headers["Content-Range"] = f"bytes */{len(content)}"
                self._send(b"", status=416, headers=headers)
                return
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            status, content = 206, content[start:end]
        self._send(content, status=status, headers=headers, type="application/octet-stream")

    def _send_json(
        self, values: Any, *, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self._send(
            json.dumps(values).encode(), status=status, headers=headers, type="application/json"
        )

    def _send(
        self,
        body: bytes,
        *,
        status: int,
        headers: dict[str, str] | None = None,
        type: str = "text/plain",
    ) -> None:
        for loss in self.hub.losses:
            loss(self.request_seen)
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(path: str, content: bytes) -> str:
    is_lfs = path.endswith(LFS_SUFFIXES)
    return _pointer(content) if is_lfs else blob_id(content)


def _pointer(content: bytes) -> str:
    """The hash that git knows of a large file: the one under which it was announced."""
    return content.oid if isinstance(content, Large) else hashlib.sha256(content).hexdigest()


def _entry(name: str, files: Files) -> dict[str, Any]:
    if name not in files:
        return {"type": "directory", "path": name, "size": 0, "oid": blob_id(name.encode())}
    content = files[name]
    entry = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
    if name.endswith(LFS_SUFFIXES):
        digest = _pointer(content)
        entry["oid"] = blob_id(digest.encode())
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry


def card_errors(content: str) -> list[str]:
    """What the Hub would not take in the YAML of a dataset card, as far as it says."""
    import yaml

    try:
        head = yaml.safe_load(content.split("---\n")[1])
    except (IndexError, yaml.YAMLError):
        return ["the YAML cannot be parsed"]
    errors = []
    if head.get("license") not in (None, *LICENSES):
        errors.append('"license" must be one of the known ones')
    if not re.fullmatch(r"[a-z0-9.-]+", head.get("license_name", "x")):
        errors.append('"license_name" must be lower-case and without spaces')
    for key in ("tags", "language", "size_categories", "task_categories"):
        if not all(isinstance(value, str) for value in head.get(key, [])):
            errors.append(f'"{key}" must be a list of strings')
    for size in head.get("size_categories", []):
        if not re.fullmatch(r"n<1K|\d+[KMBT]<n<\d+[KMBT]|n>1T", size):
            errors.append('"size_categories" must be one of the known ones')
    return errors


class Client:
    """A process with the client libraries loaded, which runs each command in a fork of itself.

    So every command sees what a fresh process sees, without the six seconds that the imports take.
    """

    def __init__(self, endpoint: str, home: Path) -> None:
        self.pid_file = home / "pid"
        """Holds the process id of the command that runs."""
        home.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.loopback_hub", str(self.pid_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment(endpoint, home)},
        )

    def cli(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """`logit-dataset …`."""
        return self._run({"arguments": [str(argument) for argument in arguments]})

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        """`python -c …`."""
        return self._run({"code": code})

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _run(self, command: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return subprocess.CompletedProcess(**json.loads(self._process.stdout.readline()))


def _serve_commands() -> None:
    """What the process of a Client does."""
    import tempfile

    for name in (
        "builder.build.build",
        "builder.cli.main",
        "builder.build.delivery",
        "builder.plan.estimate",
    ):
        importlib.import_module(name)
    from transformers import LlamaForCausalLM  # noqa: F401 – a lazy import made now

    for line in sys.stdin:
        command = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                signal.alarm(COMMAND_SECONDS)
                os._exit(_run_command(command))
            Path(sys.argv[1]).write_text(str(child))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            for file in (out, err):
                file.seek(0)
            reply = {
                "args": next(iter(command.values())),
                "returncode": status,
                "stdout": out.read().decode(),
                "stderr": err.read().decode(),
            }
        print(json.dumps(reply), flush=True)


def _run_command(command: dict[str, Any]) -> int:
    """Do what the interpreter does around a program: its exit status, and its last words on stderr."""
    status: Any = 0
    try:
        if "code" in command:
            exec(command["code"], {"__name__": "__main__"})
        else:
            from builder.cli.main import main

            sys.argv[:] = ["logit-dataset", *command["arguments"]]
            main()
    except SystemExit as stop:
        status = stop.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _serve_commands()
