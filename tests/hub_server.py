"""A Hugging Face Hub on loopback: the protocol of huggingface_hub's own client, over real HTTP, kept in memory.

It speaks the routes that the client uses without xet (`HF_HUB_DISABLE_XET=1`, for endpoints that do not have it):
repositories, model information, preupload, git LFS (basic and in parts), commits, pull requests, branches and tags,
and downloads by redirect to a second server on another port, as the Hub does with its content network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITER, READER = "hf_writer", "hf_reader"
ORGANIZATION = "lab"


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    data: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def git_oid(self) -> str:
        content = self.pointer if self.is_lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass
class Repository:
    """Commits and references of a repository."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")

    def commit(self, ref: str, files: dict[str, Blob], title: str) -> str:
        oid = hashlib.sha1(f"{secrets.token_hex(8)}{title}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        found = self.refs.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, Blob]:
        return self.commits[self.refs["main"]]


@dataclass(frozen=True)
class Request:
    """A request as it arrived."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message
    body: bytes

    @property
    def token(self) -> str | None:
        kind, _, token = (self.headers.get("authorization") or "").partition(" ")
        return token if kind.lower() == "bearer" and token else None

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Response:
    """What is sent back; `cut` and `stall` are how it goes wrong on the way."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    stall: float = 0.0

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Response:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    @classmethod
    def error(cls, status: int, code: str = "", message: str = "") -> Response:
        headers = {key: value for key, value in (("X-Error-Code", code), ("X-Error-Message", message)) if value}
        response = cls.json({"error": message or code}, status)
        response.headers.update(headers)
        return response


@dataclass
class Fault:
    """Something that goes wrong with the next `times` matching requests.

    With `instead` nothing is done for them; otherwise the answer to what was done gets lost.
    """

    method: str
    pattern: str
    change: Callable[[Response], Response]
    times: int = 1_000_000
    instead: bool = False

    def applies(self, request: Request) -> bool:
        if not re.fullmatch(self.method, request.method) or not re.search(self.pattern, request.path):
            return False
        self.times -= 1
        return self.times >= 0


class Hub:
    """The state of the Hub, and what was asked of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_size: int | None = None
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.url = self.storage_url = ""

    # What tests look at

    def paths(self, method: str = ".*", pattern: str = "") -> list[str]:
        return [r.path for r in self.requests if re.fullmatch(method, r.method) and re.search(pattern, r.path)]

    def sent_bytes(self) -> int:
        """Bytes of large files that clients sent."""
        return sum(len(r.body) for r in self.requests if r.method == "PUT")

    def fail(self, method: str, pattern: str, status: int = 500, *, message: str = "", times: int = 1_000_000) -> None:
        def change(_: Response) -> Response:
            return Response.error(status, message=message)

        self.faults.append(Fault(method, pattern, change, times, instead=True))

    def change(self, method: str, pattern: str, change: Callable[[Response], Response], times: int = 1_000_000) -> None:
        self.faults.append(Fault(method, pattern, change, times))

    def stall(self, method: str, pattern: str, seconds: float = 30.0) -> None:
        def change(response: Response) -> Response:
            response.stall = seconds
            return response

        self.change(method, pattern, change)

    # What clients get

    def answer(self, request: Request, *, storage: bool) -> Response:
        with self.lock:
            self.requests.append(request)
            faults = [fault for fault in self.faults if fault.applies(request)]
            if any(fault.instead for fault in faults):
                response = Response()
            else:
                response = self._storage(request) if storage else self._hub(request)
            for fault in faults:
                response = fault.change(response)
        return response

    def _storage(self, request: Request) -> Response:
        """The content network and the bucket that large files are sent to; it must never see a token."""
        if request.token:
            return Response.error(400, message="a token was sent to another host")
        _, kind, oid, *rest = request.path.split("/")
        if request.method == "PUT" and kind == "upload":
            if rest:
                self.parts.setdefault(oid, {})[int(rest[0])] = request.body
                return Response(200, headers={"ETag": hashlib.md5(request.body).hexdigest()})
            if hashlib.sha256(request.body).hexdigest() != oid:
                return Response.error(400, message="sha256 does not match")
            self.objects[oid] = request.body
            return Response()
        if kind == "cdn" and oid in self.objects:
            return _ranged(request, self.objects[oid])
        return Response.error(404)

    def _hub(self, request: Request) -> Response:
        for method, pattern, handler in _ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and request.method in method.split("|"):
                response: Response = handler(self, request, **found.groupdict())
                return response
        return Response.error(404, message=f"no route for {request.method} {request.path}")

    def _user(self, request: Request) -> str | None:
        return {WRITER: "writer", READER: "reader"}.get(request.token or "")

    def _refusal(self, request: Request, repo: str, *, write: bool = False) -> Response | None:
        """Why the token does not give access, if it does not."""
        if request.token and self._user(request) is None:
            return Response.error(401, message="Invalid credentials in Authorization header")
        found = self.repositories.get(repo)
        if found is None or (found.private and self._user(request) is None):
            code = 404 if self._user(request) else 401
            return Response.error(code, "RepoNotFound", "Repository not found")
        if found.gated and self._user(request) != "writer":
            return Response.error(
                403 if self._user(request) else 401, "GatedRepo", f"Access to model {repo} is restricted"
            )
        if write and self._user(request) != "writer":
            return Response.error(
                403 if self._user(request) else 401, message="You don't have the rights to write to this repository"
            )
        return None

    def whoami(self, request: Request) -> Response:
        user = self._user(request)
        if user is None:
            return Response.error(401, message="Invalid credentials in Authorization header")
        return Response.json({"type": "user", "name": user, "orgs": [{"name": ORGANIZATION}]})

    def create(self, request: Request) -> Response:
        user, data = self._user(request), request.json()
        repo = f"{data.get('organization') or user}/{data['name']}"
        if user is None:
            return Response.error(401, message="Invalid username or password.")
        if user != "writer" or data.get("organization") not in (None, ORGANIZATION, user):
            return Response.error(403, message="You don't have the rights to create a model under this namespace")
        url = {"url": f"{self.url}/{repo}", "name": repo}
        if repo in self.repositories:
            return Response.json({"error": "You already created this model repo", **url}, 409)
        private = data.get("visibility") == "private" or bool(data.get("private"))
        self.repositories[repo] = Repository(private=private)
        return Response.json(url)

    def delete(self, request: Request) -> Response:
        data = request.json()
        self.repositories.pop(f"{data.get('organization')}/{data['name']}", None)
        return Response()

    def validate_yaml(self, request: Request) -> Response:
        """Stricter than the Hub: what it merely warns of is an error here."""
        found = re.match(r"---\n(.*?)\n---\n", request.json()["content"], re.DOTALL)
        metadata = yaml.safe_load(found[1]) if found else None
        errors = [] if isinstance(metadata, dict) else ["no metadata"]
        if isinstance(metadata, dict):
            kinds = {"library_name": str, "license": str, "tags": list, "pipeline_tag": str}
            errors += [f"{key} is missing" for key in ("library_name", "license", "tags") if key not in metadata]
            errors += [
                f"{key} is malformed" for key in kinds.keys() & metadata if not isinstance(metadata[key], kinds[key])
            ]
            errors += [] if metadata.get("license") != "other" or "license_name" in metadata else ["license_name"]
        body = {"errors": [{"message": error} for error in errors], "warnings": []}
        return Response.json(body, 400 if errors else 200)

    def info(self, request: Request, repo: str, revision: str = "main") -> Response:
        if refusal := self._refusal(request, repo):
            return refusal
        commit = self.repositories[repo].resolve(unquote(revision))
        if commit is None:
            return Response.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [
            {
                "rfilename": path,
                "size": len(blob.data),
                "blobId": blob.git_oid,
                **({"lfs": _lfs(blob, "sha256")} if blob.is_lfs else {}),
            }
            for path, blob in sorted(self.repositories[repo].commits[commit].items())
        ]
        found = self.repositories[repo]
        return Response.json(
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": found.private,
                "gated": "auto" if found.gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
                "createdAt": "2026-01-01T00:00:00.000Z",
                "lastModified": "2026-01-01T00:00:00.000Z",
            }
        )

    def tree(self, request: Request, repo: str, revision: str) -> Response:
        if refusal := self._refusal(request, repo):
            return refusal
        commit = self.repositories[repo].resolve(unquote(revision))
        if commit is None:
            return Response.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return Response.json(
            [
                {
                    "type": "file",
                    "path": path,
                    "size": len(blob.data),
                    "oid": blob.git_oid,
                    **({"lfs": _lfs(blob, "oid")} if blob.is_lfs else {}),
                }
                for path, blob in sorted(self.repositories[repo].commits[commit].items())
            ]
        )

    def refs(self, request: Request, repo: str) -> Response:
        if refusal := self._refusal(request, repo):
            return refusal
        found = self.repositories[repo]

        def rows(table: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"{prefix}{name}", "targetCommit": oid} for name, oid in table.items()]

        branches = {name: oid for name, oid in found.refs.items() if not name.startswith("refs/pr/")}
        return Response.json(
            {"branches": rows(branches, "refs/heads/"), "converts": [], "tags": rows(found.tags, "refs/tags/")}
        )

    def branch(self, request: Request, repo: str, name: str) -> Response:
        if refusal := self._refusal(request, repo, write=True):
            return refusal
        found = self.repositories[repo]
        found.refs[unquote(name)] = found.refs["main"]
        return Response()

    def preupload(self, request: Request, repo: str, revision: str) -> Response:
        pull_request = "create_pr" in request.query
        if refusal := self._refusal(request, repo, write=not pull_request):
            return refusal
        found = self.repositories[repo]
        commit = found.resolve(unquote(revision))
        if commit is None:
            return Response.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = []
        for item in request.json()["files"]:
            assert len(base64.b64decode(item["sample"])) == min(512, item["size"])
            is_lfs = item["path"].endswith((".safetensors", ".png", ".bin")) or item["size"] > 10 * 2**20
            blob = found.commits[commit].get(item["path"])
            files.append(
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": False,
                    "oid": blob.etag if blob else None,
                }
            )
        return Response.json({"files": files})

    def lfs_batch(self, request: Request, repo: str) -> Response:
        if refusal := self._refusal(request, repo):
            return refusal
        data = request.json()
        assert data["operation"] == "upload"
        assert "basic" in data["transfers"]
        objects = []
        for item in data["objects"]:
            row: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.objects:
                row["actions"] = self._upload_actions(item["oid"], item["size"])
            objects.append(row)
        return Response.json({"transfer": "basic", "objects": objects})

    def _upload_actions(self, oid: str, size: int) -> dict[str, Any]:
        verify = {"href": f"{self.url}/api/lfs/verify"}
        if self.part_size is None or size <= self.part_size:
            return {"upload": {"href": f"{self.storage_url}/upload/{oid}"}, "verify": verify}
        count = -(-size // self.part_size)
        header = {f"{n:05d}": f"{self.storage_url}/upload/{oid}/{n}" for n in range(1, count + 1)}
        upload = {
            "href": f"{self.url}/api/lfs/complete/{oid}",
            "header": {"chunk_size": str(self.part_size), **header},
        }
        return {"upload": upload, "verify": verify}

    def lfs_complete(self, request: Request, oid: str) -> Response:
        parts = self.parts.pop(oid, {})
        data = b"".join(parts[number] for number in sorted(parts))
        if [part["partNumber"] for part in request.json()["parts"]] != sorted(parts):
            return Response.error(400, message="parts are missing")
        if hashlib.sha256(data).hexdigest() != oid:
            return Response.error(400, message="sha256 does not match")
        self.objects[oid] = data
        return Response.json({})

    def lfs_verify(self, request: Request) -> Response:
        data = request.json()
        stored = self.objects.get(data["oid"])
        return Response.json({}) if stored is not None and len(stored) == data["size"] else Response.error(404)

    def commit(self, request: Request, repo: str, revision: str) -> Response:
        pull_request = "create_pr" in request.query
        if refusal := self._refusal(request, repo, write=not pull_request):
            return refusal
        found, ref = self.repositories[repo], unquote(revision)
        base = found.resolve(ref)
        if base is None:
            return Response.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", base) != base:
            return Response.error(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(found.commits[base])
        for line in lines[1:]:
            value, kind = line["value"], line["key"]
            if kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                if value["oid"] not in self.objects:
                    return Response.error(400, message=f"lfs object {value['oid']} is missing")
                files[value["path"]] = Blob(self.objects[value["oid"]], True)
            elif kind == "deletedFile" and files.pop(value["path"], None) is None:
                return Response.error(404, "EntryNotFound", "A file with this name doesn't exist")
        body = {}
        if pull_request:
            number = sum(name.startswith("refs/pr/") for name in found.refs) + 1
            ref = f"refs/pr/{number}"
            body["pullRequestUrl"] = f"{self.url}/{repo}/discussions/{number}"
        oid = found.commit(ref, files, header["summary"])
        return Response.json(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}", **body}
        )

    def resolve(self, request: Request, repo: str, revision: str, path: str) -> Response:
        if refusal := self._refusal(request, repo):
            return refusal
        found = self.repositories[repo]
        commit = found.resolve(unquote(revision))
        if commit is None:
            return Response.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        blob = found.commits[commit].get(unquote(path))
        headers = {"X-Repo-Commit": commit}
        if blob is None:
            response = Response.error(404, "EntryNotFound", "Entry not found")
            response.headers.update(headers)
            return response
        headers["ETag"] = f'"{blob.etag}"'
        if not blob.is_lfs:
            response = _ranged(request, blob.data)
            response.headers.update(headers)
            return response
        self.objects.setdefault(blob.sha256, blob.data)
        headers.update(
            {
                "X-Linked-Etag": f'"{blob.sha256}"',
                "X-Linked-Size": str(len(blob.data)),
                "Location": f"{self.storage_url}/cdn/{blob.sha256}",
            }
        )
        return Response(302, b"", headers)


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., Response]], ...] = (
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", r"/api/repos/create", Hub.create),
    ("DELETE", r"/api/repos/delete", Hub.delete),
    ("POST", r"/api/validate-yaml", Hub.validate_yaml),
    ("GET", rf"/api/models/{_REPO}", Hub.info),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", Hub.info),
    ("GET", rf"/api/models/{_REPO}/refs", Hub.refs),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", Hub.tree),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<name>[^/]+)", Hub.branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", Hub.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", Hub.commit),
    ("POST", r"/api/lfs/verify", Hub.lfs_verify),
    ("POST", r"/api/lfs/complete/(?P<oid>[0-9a-f]+)", Hub.lfs_complete),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("GET|HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Hub.resolve),
)


def _lfs(blob: Blob, key: str) -> dict[str, Any]:
    return {key: blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}


def _ranged(request: Request, data: bytes) -> Response:
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if not found:
        return Response(200, data, {"Accept-Ranges": "bytes"})
    start = int(found[1])
    if start >= len(data):
        return Response(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    end = min(int(found[2] or len(data) - 1), len(data) - 1)
    headers = {"Content-Range": f"bytes {start}-{end}/{len(data)}", "Accept-Ranges": "bytes"}
    return Response(206, data[start : end + 1], headers)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    storage: bool

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        request = Request(self.command, parts.path, parse_qs(parts.query), self.headers, self._body())
        response = self.hub.answer(request, storage=self.storage)
        if response.stall:
            time.sleep(response.stall)
        self.send_response(response.status)
        length = {} if "Transfer-Encoding" in response.headers else {"Content-Length": str(len(response.body))}
        headers = {**length, **response.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(response.body[: response.cut])
        if response.cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that gave up


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub and its storage, on two ports of loopback."""
    hub = Hub()
    servers = []
    for storage in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "storage": storage})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
