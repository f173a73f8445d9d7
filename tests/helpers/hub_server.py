"""A stand-in for the Hugging Face Hub: HTTP on 127.0.0.1, in memory, for the real client in a subprocess.

with HubServer() as hub:
    sha = hub.put("tester/model", {"config.json": b"{}"})
    hub.fail("GET .*/resolve/.*config.json", kind="drop")
    subprocess.run(command, env=os.environ | hub.environment(home))
    assert hub.log.sent("/resolve/") < 1000 and hub.commits("tester/model")[0].sha == sha

Long because it answers every request that the real client makes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socketserver
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE, READ = "hf_write", "hf_read"  # tokens, by role
LFS_SUFFIXES = (".bin", ".gguf", ".npy", ".npz", ".pkl", ".pt", ".pth", ".safetensors", ".zip")
PIECE = 1 << 16  # bytes of an answer written at once
Kind = Literal["drop", "short", "corrupt", "html", "garbage"]


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git stores in place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The git blob id, of the pointer for a large file."""
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        """How the tree and paths-info routes describe the file."""
        size = len(self.data)
        lfs = {"lfs": {"oid": self.sha256, "size": size, "pointerSize": len(self.pointer)}} if self.lfs else {}
        return {"type": "file", "oid": self.oid, "size": size, "path": path, **lfs}


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub keeps this file as a large one: by its name, by its size, or because it is binary."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > 10 << 20 or b"\0" in sample)


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    """Commits by sha, and references to them: `refs/heads/main`, `refs/tags/v1`, `refs/pr/1`."""

    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        sha = self.refs.get(self.ref(revision) or "", revision)
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def commit(self, ref: str, files: dict[str, File], title: str, parent: str | None) -> str:
        """Put a commit under a reference, and give its sha."""
        oids = sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(json.dumps([self.name, parent, title, len(self.commits), oids]).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, files)
        self.refs[ref] = sha
        return sha

    def named(self, prefix: str) -> list[dict[str, str]]:
        """The references under a prefix, as the refs route lists them."""
        names = [name for name in self.refs if name.startswith(prefix)]
        return [{"name": n.removeprefix(prefix), "ref": n, "targetCommit": self.refs[n]} for n in names]


@dataclass
class Record:
    """One request; the bytes are those of the bodies, and a client that left may not have got all of `sent`."""

    method: str
    path: str  # without percent-encoding
    query: str
    received: int
    agent: str
    authorized: bool  # an Authorization header came with it
    status: int = 0
    sent: int = 0


class Log(list[Record]):
    """The requests in the order in which they came; patterns are regular expressions on "METHOD /path"."""

    def matching(self, pattern: str = "") -> list[Record]:
        return [record for record in self if re.search(pattern, f"{record.method} {record.path}")]

    def sent(self, pattern: str = "") -> int:
        return sum(record.sent for record in self.matching(pattern))

    def received(self, pattern: str = "") -> int:
        return sum(record.received for record in self.matching(pattern))


@dataclass
class Fault:
    """What happens to the next `times` requests that match; see HubServer.fail."""

    pattern: str
    times: float = 1
    status: int | None = None
    kind: Kind | None = None
    headers: dict[str, str] = field(default_factory=dict)
    call: Callable[[], object] | None = None
    change: dict[str, Any] = field(default_factory=dict)


@dataclass
class Reply:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    type: str = "application/json"


INJECTED = {"html": Reply(b"<!DOCTYPE html><p>Please sign in</p>", type="text/html"), "garbage": Reply(b'{"sha": "')}


class Refused(Exception):  # noqa: N818
    """An error answer, with the headers that the client makes its exception from."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **more: str):
        text = message.encode("unicode_escape").decode()  # no line break in a header
        codes = {"X-Error-Message": text, **({"X-Error-Code": code} if code else {})}
        self.reply = Reply(json.dumps({"error": message, **more}).encode(), status, codes | (headers or {}))


class HubServer:
    """The Hub with one user, for the duration of a `with` block or between start() and stop()."""

    def __init__(self, user: str = "tester"):
        self.user = user
        self.url = ""
        self.clear()

    def clear(self) -> None:
        """As it was when it was new, at the same address."""
        self.tokens = {WRITE: "write", READ: "read"}
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}  # uploaded large files by sha256
        self.log = Log()
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def start(self) -> HubServer:
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.hub = self
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self, *error: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    __enter__, __exit__ = start, stop

    def environment(self, home: Path, token: str | None = WRITE) -> dict[str, str]:
        """The variables with which a subprocess takes this server for the Hub, its caches under `home`."""
        off = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        on = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        caches = {"HF_HOME": home, "HF_HUB_CACHE": home / "hub", "HF_MODULES_CACHE": home / "modules"}
        hosts = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        switches = dict.fromkeys(off, "0") | dict.fromkeys(on, "1")
        named = {name: str(path) for name, path in caches.items()}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": token or "", **named, **switches, **hosts}

    def create(self, repo: str, private: bool = False) -> Repo:
        """A new repository with the first commit that the Hub makes itself."""
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        with self.lock:
            created = self.repos[repo] = Repo(repo, private)
            created.commit("refs/heads/main", {".gitattributes": File(rules.encode(), False)}, "initial commit", None)
        return created

    def put(self, repo: str, files: dict[str, bytes | None], message: str = "Update", revision: str = "main") -> str:
        """Commit as somebody else, and give the sha. None deletes a file; paths are taken as they are, `../x` too."""
        with self.lock:
            found = self.repos.get(repo) or self.create(repo)
            parent, ref = found.at(revision), found.ref(revision)
            assert ref, f"{revision} is no branch"
            content = {path: data for path, data in files.items() if data is not None}
            new = {path: File(data, is_lfs(path, len(data), data[:512])) for path, data in content.items()}
            kept = {path: file for path, file in parent.files.items() if path not in files}
            self.lfs |= {file.sha256: file.data for file in new.values() if file.lfs}
            return found.commit(ref, kept | new, message, parent.sha)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository, the Hub's own .gitattributes included."""
        return {path: file.data for path, file in self.repos[repo].at(revision).files.items()}

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """The history of a revision, newest first."""
        history = [self.repos[repo].at(revision)]
        while history[-1].parent:
            history.append(self.repos[repo].commits[history[-1].parent])
        return history

    def fail(self, pattern: str, times: float = 1, status: int | None = None, **more: Any) -> Fault:
        """Let the next `times` requests that match the pattern, a regular expression on "METHOD /path", go wrong.

        `status` (with `headers`) answers so, and `kind` "html" or "garbage" answers 200 with a page or with broken
        JSON; the request has no effect. "drop" serves it but closes the connection after half of the body, "short"
        sends half of the body as if that were all, "corrupt" flips one bit. `change` replaces keys of a JSON answer.
        `call` is called before anything else.
        The first fault that matches a request is taken; its `times` counts down.
        """
        fault = Fault(pattern, times, status, **more)
        self.faults.append(fault)
        return fault

    def take_fault(self, request: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return Fault("")


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away is no error
            super().handle_error(request, client_address)


_REPO, _REVISION = r"(?P<repo>[^/]+(?:/[^/]+)?)", r"(?P<revision>refs/pr/\d+|[^/]+)"
_MODEL = f"/api/models/{_REPO}"
_ROUTES = {
    "GET /api/whoami-v2": "whoami",
    "POST /api/validate-yaml": "validate_yaml",
    "POST /api/repos/create": "create",
    f"POST /{_REPO}\\.git/info/lfs/objects/batch": "lfs_batch",
    "PUT /lfs/(?P<oid>[0-9a-f]{64})": "lfs_put",
    f"POST {_MODEL}/preupload/{_REVISION}": "preupload",
    f"POST {_MODEL}/commit/{_REVISION}": "commit",
    f"POST {_MODEL}/branch/(?P<branch>[^/]+)": "branch",
    f"POST {_MODEL}/tag/{_REVISION}": "tag",
    f"GET {_MODEL}/refs": "refs",
    f"GET {_MODEL}/tree/{_REVISION}(?:/(?P<folder>.+))?": "tree",
    f"POST {_MODEL}/paths-info/{_REVISION}": "paths_info",
    f"GET {_MODEL}(?:/revision/{_REVISION})?": "model_info",
    f"(?:GET|HEAD) /{_REPO}/resolve/{_REVISION}/(?P<path>.+)": "resolve",
}


class _Handler(BaseHTTPRequestHandler):
    """One connection. Each route is a method that gives a Reply or what to send as JSON."""

    server: _Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    def log_message(self, *arguments: object) -> None:
        pass

    def serve(self) -> None:
        self.hub, url = self.server.hub, urlsplit(self.path)
        self.query, self.body = parse_qs(url.query), self._read()
        token, agent = self.headers.get("Authorization"), self.headers.get("User-Agent", "")
        self.role = self.hub.tokens.get((token or "").removeprefix("Bearer "))
        self.record = Record(self.command, unquote(url.path), url.query, len(self.body), agent, token is not None)
        self.hub.log.append(self.record)
        fault = self.hub.take_fault(f"{self.command} {self.record.path}")
        if fault.call:
            fault.call()
        try:
            if fault.status:
                raise Refused(fault.status, "injected", headers=fault.headers)
            reply = INJECTED.get(fault.kind or "") or self._route(url.path)
            if fault.change:
                reply = Reply(json.dumps(json.loads(reply.body) | fault.change).encode())
        except Refused as refused:
            reply = refused.reply
        self._send(reply, fault.kind)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

    def _read(self) -> bytes:
        """The body of the request."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self._exactly(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline() or self._exactly(1), 16):
            parts.append(self._exactly(size + 2)[:-2])
        self.rfile.readline()
        return b"".join(parts)

    def _exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionResetError("the client left")
        return data

    def _route(self, path: str) -> Reply:
        if self.record.authorized and self.role is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        for pattern, name in _ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                given = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                answer = getattr(self, f"_{name}")(**given)
                return answer if isinstance(answer, Reply) else Reply(json.dumps(answer).encode())
        raise Refused(404, f"Cannot {self.command} {self.record.path}")

    def _send(self, reply: Reply, kind: Kind | None) -> None:
        body, half = reply.body, len(reply.body) // 2
        if kind == "short":
            body = body[:half]
        elif kind == "corrupt":
            body = body[:half] + bytes(byte ^ 1 for byte in body[half : half + 1]) + body[half + 1 :]
        self.record.status = reply.status
        self.send_response(reply.status)
        for header in {"Content-Type": reply.type, "Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(*header)
        self.end_headers()
        if kind == "drop":
            body, self.close_connection = body[:half], True
        for start in range(0, len(body) if self.command != "HEAD" else 0, PIECE):
            piece = body[start : start + PIECE]
            self.record.sent += len(piece)
            self.wfile.write(piece)

    def _find(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.role is None):
            raise Refused(404 if self.role else 401, "Repository not found", "RepoNotFound")
        return repo

    def _need_token(self, roles: tuple[str, ...] = ("write",), code: str = "") -> None:
        if self.role is None:
            raise Refused(401, "Invalid username or password.", code)
        if self.role not in roles:
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")

    def _writable(self, name: str) -> Repo:
        repo = self._find(name)
        self._need_token(code="RepoNotFound")  # over https the client concludes this from the address
        return repo

    def _whoami(self) -> Any:
        self._need_token(tuple(self.hub.tokens.values()))
        token = {"displayName": self.role, "role": self.role}
        return {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": token}}

    def _validate_yaml(self) -> Any:
        return {"errors": [], "warnings": []}

    def _create(self) -> Any:
        self._need_token()
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        self.hub.create(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": f"{self.hub.url}/{name}", "name": name}

    def _preupload(self, repo: str, revision: str) -> Any:
        present, answer = self._writable(repo).at(revision).files, []
        for asked in json.loads(self.body)["files"]:
            path, file = asked["path"], present.get(asked["path"])
            lfs = is_lfs(path, asked["size"], base64.b64decode(asked["sample"]))
            known = {"oid": file.etag} if file else {}
            answer.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **known})
        return {"files": answer}

    def _lfs_batch(self, repo: str) -> Any:
        self._writable(repo)
        objects = json.loads(self.body)["objects"]
        for asked in objects:
            if asked["oid"] not in self.hub.lfs:
                asked["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The content does not have this sha256")
        self.hub.lfs[oid] = self.body
        return Reply(b"")

    def _commit(self, repo: str, revision: str) -> Any:
        found = self._writable(repo)
        (_, header), *operations = (json.loads(line).values() for line in self.body.splitlines())
        with self.hub.lock:
            head, ref = found.at(revision), found.ref(revision)
            if ref is None or ref.startswith("refs/tags/"):
                raise Refused(404, f"Not a branch: {revision}", "RevisionNotFound")
            parent, pull = header.get("parentCommit", head.sha), {}
            if "create_pr" in self.query:
                number = len(found.named("refs/pr/")) + 1
                head, ref = found.at(parent), f"refs/pr/{number}"
                pull = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"}
            elif parent != head.sha:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for key, operation in operations:
                self._apply(files, key, **operation)
            sha = found.commit(ref, files, header["summary"], head.sha)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", **pull}

    def _apply(self, files: dict[str, File], key: str, path: str, content: str = "", oid: str = "", **_: Any) -> None:
        """Carry out one line of a commit."""
        if key == "file":
            files[path] = File(base64.b64decode(content), lfs=False)
        elif key == "lfsFile":
            if oid not in self.hub.lfs:
                raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = File(self.hub.lfs[oid], lfs=True)
        else:
            inside = f"{path.rstrip('/')}/" if key == "deletedFolder" else None
            gone = [name for name in files if (name.startswith(inside) if inside else name == path)]
            if not gone:
                raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]

    def _branch(self, repo: str, branch: str) -> Any:
        start = json.loads(self.body).get("startingPoint", "main")
        return self._point(self._writable(repo), f"refs/heads/{branch}", start)

    def _tag(self, repo: str, revision: str) -> Any:
        return self._point(self._writable(repo), f"refs/tags/{json.loads(self.body)['tag']}", revision)

    def _point(self, repo: Repo, ref: str, revision: str) -> Any:
        if ref in repo.refs:
            raise Refused(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.at(revision).sha
        return {}

    def _refs(self, repo: str) -> Any:
        found = self._find(repo)
        pulls = {"pullRequests": found.named("refs/pr/")} if "include_prs" in self.query else {}
        return {"branches": found.named("refs/heads/"), "tags": found.named("refs/tags/"), "converts": [], **pulls}

    def _model_info(self, repo: str, revision: str = "main") -> Any:
        found = self._find(repo)
        commit, siblings = found.at(revision), []
        for path, file in sorted(commit.files.items()):
            blob: dict[str, Any] = {"size": len(file.data), "blobId": file.oid}
            if file.lfs:
                blob["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
            siblings.append({"rfilename": path, **(blob if "blobs" in self.query else {})})
        names = {"_id": repo, "id": repo, "modelId": repo, "author": repo.split("/")[0]}
        card = commit.files.get("README.md")
        if config := commit.files.get("config.json"):
            with suppress(ValueError):
                names["config"] = (
                    {"model_type": json.loads(config.data)["model_type"]} if b"model_type" in config.data else {}
                )
        names |= {"cardData": yaml.safe_load(card.data.split(b"---")[1])} if card and card.data[:3] == b"---" else {}
        return {**names, "sha": commit.sha, "private": found.private, "tags": [], "siblings": siblings}

    def _tree(self, repo: str, revision: str, folder: str = "") -> Any:
        files = self._find(repo).at(revision).files
        prefix = f"{folder}/" if folder else ""
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {".", "/"}
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
        entries += [file.entry(path) for path, file in sorted(files.items())]
        inside = [entry for entry in entries if entry["path"].startswith(prefix)]
        if prefix and not inside:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        deep = self.query.get("recursive") == ["true"]
        return [entry for entry in inside if deep or "/" not in entry["path"].removeprefix(prefix)]

    def _paths_info(self, repo: str, revision: str) -> Any:
        files = self._find(repo).at(revision).files
        return [files[path].entry(path) for path in parse_qs(self.body.decode()).get("paths", []) if path in files]

    def _resolve(self, repo: str, revision: str, path: str) -> Any:
        commit = self._find(repo).at(revision)
        headers, file = {"X-Repo-Commit": commit.sha}, commit.files.get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        return self._ranged(Reply(file.data, headers=headers, type="application/octet-stream"))

    def _ranged(self, reply: Reply) -> Reply:
        """The part of the body that the client asked for, `bytes=A-B` or `bytes=A-`."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or self.command == "HEAD":
            return reply
        start, size = int(match[1]), len(reply.body)
        stop = min(int(match[2]) + 1, size) if match[2] else size
        if start >= stop:
            raise Refused(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        headers = reply.headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return Reply(reply.body[start:stop], 206, headers, reply.type)
