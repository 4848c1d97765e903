"""A minimal in-process stand-in for the Hugging Face Hub, for tests that must not leave the machine.

`LoopbackHub` serves, on 127.0.0.1 and a free port, the part of the Hub's HTTP interface that ``huggingface_hub`` and
``transformers`` use to create a model repo, commit to it (regular and LFS files, deletions) and read it back. Repos
live in memory. Only the standard library is used here.

The client libraries read most of their settings once, when they are imported, so run them in a subprocess::

    with LoopbackHub() as hub:
        subprocess.run([sys.executable, "-c", script], env={**os.environ, **hub.env(tmp_path)}, check=True)
        assert "README.md" in hub.files("user/name")

It follows the Hub where a client can tell: a new repo holds a ``.gitattributes``, which decides what is LFS; every
commit stays readable under its hash; unchanged files are reported so that the client drops them from the commit; a bad
token is refused even for reads, a missing one only for writes and for private repos. It leaves out: Xet, pull requests,
tags, datasets and spaces, multipart uploads, YAML validation, ``.gitignore`` and the CDN redirect of LFS files. A call
it does not know answers 501, which the client does not retry.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

MAIN = "main"
# The Hub refuses larger files as regular ones and so asks for LFS whatever their name.
LFS_THRESHOLD = 10 * 1024 * 1024
# What the Hub puts into the `.gitattributes` of a new repo.
_LFS_PATTERNS = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot
*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz
*.zip *.zst *tfevents*
"""
_GIT_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS_PATTERNS.split()
).encode()


@dataclass(frozen=True)
class Request:
    """One HTTP request, its body read in full; `path` is still percent-encoded and has no query."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body as a JSON object."""
        return cast("dict[str, Any]", json.loads(self.body))

    def flag(self, name: str) -> bool:
        """Whether a query parameter is set to a true value."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Response:
    """One HTTP response; `Content-Length` is added from the body."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class HubError(Exception):
    """A refusal, told to the client through the Hub's `X-Error-*` headers."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    def response(self) -> Response:
        """The refusal as the Hub words it: a JSON body, and the same in headers."""
        message = str(self)
        # A header cannot hold line breaks or arbitrary text.
        headers = {"X-Error-Message": ascii(message)[1:-1]}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return _json({"error": message}, self.status, headers)


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        """The LFS object id."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself holds for an LFS file."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @property
    def git_oid(self) -> str:
        """The id of the git blob."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        """What identifies the content to the client's cache, and to its check for unchanged files."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A snapshot of a repo."""

    oid: str
    title: str
    date: str
    files: Mapping[str, StoredFile]


class Repo:
    """A model repo: its branches, and every commit ever made, so that a pinned hash stays readable."""

    def __init__(self, repo_id: str, private: bool) -> None:
        self.repo_id = repo_id
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.commit(MAIN, "initial commit", {".gitattributes": StoredFile(_GIT_ATTRIBUTES, lfs=False)})
        self.created = self.at(MAIN).date

    def commit(self, branch: str, title: str, files: Mapping[str, StoredFile]) -> Commit:
        """Make `files` the whole content of the branch."""
        # The count keeps two commits of the same content apart.
        seed = f"{self.repo_id} {len(self.commits)} {title} {sorted((path, f.git_oid) for path, f in files.items())}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), title, _now(), dict(files))
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def at(self, revision: str) -> Commit:
        """The commit a branch name or a commit hash stands for."""
        commit = self.commits.get(self.branches.get(revision, revision))
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


class LoopbackHub:
    """The server, as a context manager; it listens from `__enter__` to `__exit__`."""

    def __init__(self, token: str = "hf_test", user: str = "user", role: str = "write") -> None:
        self.token = token
        self.user = user
        self.role = role
        """What the token may do: "write" or "read"."""
        self.requests: list[tuple[str, str]] = []
        """Method and percent-encoded path, without the query, of every request so far, in order of arrival."""
        self._repos: dict[str, Repo] = {}
        self._lfs_objects: dict[str, bytes] = {}
        # The client sends no token with an LFS upload, as the Hub hands out pre-signed addresses; so does this one.
        self._upload_key = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LoopbackHub:
        self._server = _Server(self)
        # The default poll of half a second would be added to every test on leaving.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        assert self._thread is not None
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """The address to use in place of the Hub's."""
        assert self._server is not None, "use LoopbackHub in a with statement"
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def files(self, repo_id: str, revision: str = MAIN) -> dict[str, bytes]:
        """Path and content of every file of a repo (its `.gitattributes` too), by default on the main branch."""
        with self._lock:
            return {path: file.content for path, file in self._repos[repo_id].at(revision).files.items()}

    def commits(self, repo_id: str) -> list[str]:
        """The titles of all commits of a repo, oldest first; the first is the one that made the repo."""
        with self._lock:
            return [commit.title for commit in self._repos[repo_id].commits.values()]

    def env(self, cache_dir: str | Path) -> dict[str, str]:
        """The variables a client process needs on top of the inherited ones."""
        cache = Path(cache_dir)
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(cache),
            # These follow HF_HOME unless the machine sets them, so name them too.
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_ASSETS_CACHE": str(cache / "assets"),
            "HF_XET_CACHE": str(cache / "xet"),
            "HF_MODULES_CACHE": str(cache / "modules"),
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
            "HF_HUB_DISABLE_XET": "1",
            # Both, since a machine without network may set either.
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            # The proxy of the machine, if any, cannot reach this process.
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def answer(self, request: Request) -> Response:
        """Route a request; called from the server's threads."""
        with self._lock:
            self.requests.append((request.method, request.path))
            try:
                return self._route(request)
            except HubError as error:
                return error.response()
            except Exception as error:
                # Not a 5xx: the client would retry that for a long while and hide the fault.
                return HubError(400, f"loopback hub: {type(error).__name__}: {error}").response()

    def _route(self, request: Request) -> Response:
        """Find the handler of a request, check the token, run it."""
        for method, pattern, handler, signed_in in _ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match is not None and request.method == method:
                self._check_token(request, required=signed_in)
                # Decoded only now, as a revision or a path may hold encoded slashes.
                return handler(self, request, **{k: unquote(v) for k, v in match.groupdict().items() if v is not None})
        raise HubError(501, f"loopback hub: no {request.method} {request.path}")

    def _check_token(self, request: Request, required: bool) -> None:
        """Refuse a wrong token always, and a missing one where it is required."""
        header = request.headers.get("Authorization")
        if header != f"Bearer {self.token}" and (required or header is not None):
            raise HubError(401, "Invalid credentials in Authorization header")

    def _repo(self, request: Request, repo_id: str) -> Repo:
        """The repo, if it is there and the caller may see it."""
        repo = self._repos.get(repo_id)
        if repo is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if repo.private and "Authorization" not in request.headers:
            raise HubError(401, "Repository not found", "RepoNotFound")
        return repo

    def _auth_check(self, request: Request, repo: str) -> Response:
        """Whether the caller may write to a repo."""
        self._repo(request, repo)
        if self.role != "write":
            raise HubError(403, "Forbidden: this token can't write to the repository")
        return _json({})

    def _create_repo(self, request: Request) -> Response:
        payload = request.json()
        if payload.get("type", "model") != "model":
            raise HubError(501, "loopback hub: only model repos")
        repo_id = f"{payload.get('organization') or self.user}/{payload['name']}"
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self._repos:
            # The client reads the url of this refusal too, under exist_ok.
            return _json({**answer, "error": "You already created this model repo"}, 409)
        if self.role != "write":
            raise HubError(403, "Forbidden: this token can't make a repository")
        self._repos[repo_id] = Repo(repo_id, private=payload.get("visibility") == "private")
        return _json(answer)

    def _whoami(self, request: Request) -> Response:
        access = {"displayName": "loopback", "role": self.role}
        auth = {"type": "access_token", "accessToken": access}
        return _json({"type": "user", "id": "0", "name": self.user, "fullname": self.user, "orgs": [], "auth": auth})

    def _validate_yaml(self, request: Request) -> Response:
        """Only what can be told without a YAML parser: a card without metadata draws the Hub's warning."""
        has_metadata = request.json()["content"].startswith("---")
        warning = {"message": "empty or missing yaml metadata in repo card"}
        return _json({"errors": [], "warnings": [] if has_metadata else [warning]})

    def _info(self, request: Request, repo: str, revision: str = MAIN) -> Response:
        found = self._repo(request, repo)
        commit = found.at(revision)
        siblings = [
            {"rfilename": path, **(_blob_info(file) if request.flag("blobs") else {})}
            for path, file in sorted(commit.files.items())
        ]
        info = {"_id": "0", "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.oid}
        state = {"private": found.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        dates = {"createdAt": found.created, "lastModified": commit.date}
        return _json({**info, **state, **dates, "siblings": siblings})

    def _tree(self, request: Request, repo: str, revision: str, path: str = "") -> Response:
        files = self._repo(request, repo).at(revision).files
        prefix = f"{path}/" if path else ""
        inside = {name: file for name, file in files.items() if name.startswith(prefix)}
        if path and not inside:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        entries = [*map(_folder_entry, _folders(inside)), *(_file_entry(*item) for item in inside.items())]
        below = [e for e in entries if e["path"].startswith(prefix)]
        wanted = below if request.flag("recursive") else [e for e in below if "/" not in e["path"][len(prefix) :]]
        return _json(sorted(wanted, key=lambda entry: str(entry["path"])))

    def _paths_info(self, request: Request, repo: str, revision: str) -> Response:
        files = self._repo(request, repo).at(revision).files
        folders = _folders(files)
        paths = parse_qs(request.body.decode()).get("paths", [])
        found = [_file_entry(path, files[path]) for path in paths if path in files]
        return _json(found + [_folder_entry(path) for path in paths if path in folders])

    def _preupload(self, request: Request, repo: str, revision: str) -> Response:
        files = self._repo(request, repo).at(revision).files
        return _json({"files": [_upload_plan(item, files) for item in request.json()["files"]]})

    def _create_branch(self, request: Request, repo: str, revision: str) -> Response:
        found = self._repo(request, repo)
        if revision in found.branches:
            raise HubError(409, f"Reference already exists: {revision}")
        found.branches[revision] = found.at(request.json().get("startingPoint", MAIN)).oid
        return _json({})

    def _commit(self, request: Request, repo: str, revision: str) -> Response:
        found = self._repo(request, repo)
        if request.flag("create_pr"):
            raise HubError(501, "loopback hub: no pull requests")
        if revision not in found.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *operations = map(json.loads, request.body.splitlines())
        head = found.at(revision)
        if not head.oid.startswith(header["value"].get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        commit = found.commit(revision, header["value"]["summary"], files)
        url = f"{self.endpoint}/{repo}/commit/{commit.oid}"
        return _json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: dict[str, StoredFile], key: str, value: Mapping[str, str]) -> None:
        """Do one operation of a commit to the files of its parent."""
        path = value["path"]
        if key == "file":
            files[path] = StoredFile(base64.b64decode(value["content"], validate=True), lfs=False)
        elif key == "lfsFile":
            files[path] = StoredFile(self._lfs_object(value["oid"]), lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            _delete(files, path, folder=key == "deletedFolder")
        else:
            raise HubError(501, f"loopback hub: no commit operation {key}")

    def _lfs_object(self, oid: str) -> bytes:
        """An uploaded LFS object; a commit or a check may name only those."""
        if oid not in self._lfs_objects:
            raise HubError(400, f"LFS object {oid} was not uploaded")
        return self._lfs_objects[oid]

    def _lfs_batch(self, request: Request, repo: str) -> Response:
        self._repo(request, repo)
        payload = request.json()
        if payload["operation"] != "upload":
            raise HubError(501, "loopback hub: LFS batches only for uploads")
        objects = [self._lfs_action(repo, item) for item in payload["objects"]]
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_action(self, repo: str, item: Mapping[str, Any]) -> dict[str, Any]:
        """Where to upload an object; without actions, the client takes it as already there."""
        entry = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] in self._lfs_objects:
            return entry
        upload = {"href": f"{self.endpoint}/lfs-upload/{self._upload_key}/{item['oid']}"}
        verify = {"href": f"{self.endpoint}/{repo}.git/info/lfs/verify"}
        return {**entry, "actions": {"upload": upload, "verify": verify}}

    def _lfs_put(self, request: Request, key: str, oid: str) -> Response:
        if key != self._upload_key:
            raise HubError(403, "Wrong upload address")
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The uploaded content is not the announced one")
        self._lfs_objects[oid] = request.body
        return Response(200, b"")

    def _lfs_verify(self, request: Request, repo: str) -> Response:
        payload = request.json()
        if len(self._lfs_object(payload["oid"])) != payload["size"]:
            raise HubError(400, "The uploaded content has another size")
        return _json({})

    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> Response:
        commit = self._repo(request, repo).at(revision)
        # Told for a missing file too: the client caches its absence under the commit.
        headers = {"X-Repo-Commit": commit.oid}
        file = commit.files.get(path)
        if file is None:
            refusal = HubError(404, "Entry not found", "EntryNotFound").response()
            return Response(refusal.status, refusal.body, {**refusal.headers, **headers})
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return _ranged(request, file.content, headers)


_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_REVISION = r"(?P<revision>[^/]+)"
_API = f"/api/models/{_REPO}"
# Method, pattern of the path, handler, whether it needs the token.
_ROUTES: list[tuple[str, str, Callable[..., Response], bool]] = [
    ("POST", "/api/repos/create", LoopbackHub._create_repo, True),
    ("GET", "/api/whoami-v2", LoopbackHub._whoami, True),
    ("POST", "/api/validate-yaml", LoopbackHub._validate_yaml, False),
    ("GET", _API, LoopbackHub._info, False),
    ("GET", f"{_API}/revision/{_REVISION}", LoopbackHub._info, False),
    ("GET", f"{_API}/auth-check/write", LoopbackHub._auth_check, True),
    ("GET", f"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?", LoopbackHub._tree, False),
    ("POST", f"{_API}/paths-info/{_REVISION}", LoopbackHub._paths_info, False),
    ("POST", f"{_API}/preupload/{_REVISION}", LoopbackHub._preupload, True),
    ("POST", f"{_API}/branch/{_REVISION}", LoopbackHub._create_branch, True),
    ("POST", f"{_API}/commit/{_REVISION}", LoopbackHub._commit, True),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", LoopbackHub._lfs_batch, True),
    ("POST", rf"/{_REPO}\.git/info/lfs/verify", LoopbackHub._lfs_verify, True),
    ("PUT", "/lfs-upload/(?P<key>[0-9a-f]+)/(?P<oid>[0-9a-f]{64})", LoopbackHub._lfs_put, False),
    ("HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", LoopbackHub._resolve, False),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", LoopbackHub._resolve, False),
]


def _now() -> str:
    """The time as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(status, json.dumps(value).encode(), {**(headers or {}), "Content-Type": "application/json"})


def _folders(files: Mapping[str, StoredFile]) -> set[str]:
    """Every folder that holds one of the files."""
    return {path[:i] for path in files for i, character in enumerate(path) if character == "/"}


def _folder_entry(path: str) -> dict[str, Any]:
    """A folder as a tree listing shows it; its id only has to be there."""
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


def _file_entry(path: str, file: StoredFile) -> dict[str, Any]:
    """A file as a tree listing shows it."""
    size = len(file.content)
    entry = {"type": "file", "oid": file.git_oid, "size": size, "path": path}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": size, "pointerSize": len(file.pointer)}
    return entry


def _blob_info(file: StoredFile) -> dict[str, Any]:
    """The same as `_file_entry`, in the words of a model's siblings."""
    size = len(file.content)
    lfs = {"lfs": {"sha256": file.sha256, "size": size, "pointerSize": len(file.pointer)}} if file.lfs else {}
    return {"blobId": file.git_oid, "size": size, **lfs}


def _upload_plan(item: Mapping[str, Any], files: Mapping[str, StoredFile]) -> dict[str, Any]:
    """How to upload a file, and what is there under its name."""
    path = item["path"]
    lfs = item["size"] > LFS_THRESHOLD or _is_lfs(path, files)
    plan = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
    if path in files:
        plan["oid"] = files[path].etag
    return plan


def _is_lfs(path: str, files: Mapping[str, StoredFile]) -> bool:
    """Whether the repo's `.gitattributes` sends the path to LFS."""
    attributes = files[".gitattributes"].content.decode() if ".gitattributes" in files else ""
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    # As in git, a pattern without a slash is about the last part of the path.
    return any(fnmatchcase(path if "/" in pattern else path.rsplit("/", 1)[-1], pattern) for pattern in patterns)


def _delete(files: dict[str, StoredFile], path: str, folder: bool) -> None:
    """Take a file, or all files of a folder, out of `files`."""
    gone = [name for name in files if (name.startswith(f"{path.rstrip('/')}/") if folder else name == path)]
    if not gone:
        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
    for name in gone:
        del files[name]


def _ranged(request: Request, content: bytes, headers: Mapping[str, str]) -> Response:
    """All of the content, or the part asked for: clients resume downloads and peek into safetensors headers."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if match is None:
        return Response(200, content, headers)
    start, end = int(match[1]), int(match[2] or len(content) - 1)
    if start >= len(content):
        raise HubError(416, "Range not satisfiable")
    part = content[start : end + 1]
    span = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
    return Response(206, part, {**headers, "Content-Range": span})


class _Server(ThreadingHTTPServer):
    """The listening socket; its port is chosen by the system."""

    def __init__(self, hub: LoopbackHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def server_bind(self) -> None:
        """Bind without the base class's look-up of the host's name, which may be slow off the network."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what went wrong, unless a client merely ended with open connections."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Turns bytes into a `Request` and a `Response` into bytes."""

    # Connections stay open between requests, as with the Hub.
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes; otherwise the second would wait for an acknowledgement.
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        if "Transfer-Encoding" in self.headers:
            # The client announces the size of all it sends, so streamed bodies are not decoded; this also hangs up.
            return self.send_error(411)
        # The body is read whatever the answer, or its rest would be taken for the next request.
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        headers = cast("Mapping[str, str]", self.headers)
        request = Request(self.command, url.path, parse_qs(url.query), headers, body)
        self._send(cast(_Server, self.server).hub.answer(request))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, response: Response) -> None:
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output clean; `LoopbackHub.requests` is the log."""
