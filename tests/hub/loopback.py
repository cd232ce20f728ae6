"""A server that speaks the Hub's protocol, on this machine only.

    with LoopbackHub() as hub:
        hub.add_user("alice", "hf_alice")
        HfApi(endpoint=hub.url, token="hf_alice").create_repo("alice/model")

The client is the real one. Its requests are checked as the Hub would check them: a commit is refused if it names a
large file that was never uploaded, or a wrong size or sha256. The storage refuses requests that carry the user's
token. Faults are ordered beforehand: `hub.answer("POST", "/commit/", status=503)`, `hub.cut(…)`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import secrets
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote

from tests.hub.repositories import Commit, File, Refused, Repository, card_problems, checked_path, is_large
from tests.hub.transport import Answer, Fault, Request, Route, Server, ranged

_ID = r"(?P<id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"


@dataclass(frozen=True)
class User:
    name: str
    organizations: tuple[str, ...] = ()
    role: str = "write"

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.name, *self.organizations)


@dataclass
class _Upload:
    """A large file whose upload has begun."""

    repository: Repository
    sha256: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)
    data: bytes | None = None

    def keep(self, data: bytes) -> None:
        if len(data) != self.size or hashlib.sha256(data).hexdigest() != self.sha256:
            raise Refused(400, f"The upload has {len(data)} bytes that are not those announced ({self.size} bytes)")
        self.data = data


class LoopbackHub:
    """The Hub and, on another port instead of another host, the storage of its large files.

    Args:
        part_size: Larger files are uploaded in parts of this many bytes.
        page_size: The entries in one answer to a `tree` request.
    """

    def __init__(self, part_size: int = 1 << 20, page_size: int = 1000) -> None:
        self.part_size, self.page_size = part_size, page_size
        self.users: dict[str, User] = {}
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        # `requests` has each request with its answer's status, `trouble` unknown requests and this server's errors.
        self.requests: list[tuple[str, str, int]] = []
        self.trouble: list[str] = []
        self.lock = threading.RLock()
        self._uploads: dict[str, _Upload] = {}
        self._downloads: dict[str, File] = {}
        self._hub = Server(self, self._hub_routes())
        self._storage = Server(self, self._storage_routes(), is_storage=True)
        self.url, self.storage_url = self._hub.url, self._storage.url

    def __enter__(self) -> LoopbackHub:
        for server in (self._hub, self._storage):
            server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the ports and every connection."""
        for server in (self._hub, self._storage):
            server.stop()

    # ---- what tests order and look at --------------------------------------------------------------------------------

    def add_user(self, name: str, token: str, *organizations: str, role: str = "write") -> None:
        self.users[token] = User(name, organizations, role)

    def add_repository(self, name: str, files: dict[str, bytes]) -> Repository:
        """Add a repository of another user, with small files."""
        repository = self.repositories[name] = Repository(name)
        content = {path: base64.b64encode(data).decode() for path, data in files.items()}
        lines: list[Any] = [{"key": "header", "value": {"summary": "By hand"}}]
        lines += [
            {"key": "file", "value": {"path": path, "content": text, "encoding": "base64"}}
            for path, text in content.items()
        ]
        repository.commit("main", lines, repository.namespace, create_pr=False)
        return repository

    def repository(self, name: str) -> Repository:
        return self.repositories[name]

    def contents(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, without the one that the Hub itself adds."""
        files = self.repositories[name].at(revision).files
        return {path: file.data for path, file in files.items() if path != ".gitattributes"}

    def answer(
        self,
        method: str,
        pattern: str,
        status: int,
        message: str = "A fault",
        *,
        code: str | None = None,
        times: int = 1,
        within: str = "",
        **headers: str,
    ) -> Fault:
        """Answer the next matching requests with an error, and do nothing."""
        return self._order(Fault(method, pattern, "answer", times, within, Refused(status, message, code, **headers)))

    def hang_up(self, method: str, pattern: str, times: int = 1) -> Fault:
        """Close the connection when half of a request is read, for the next matching requests."""
        return self._order(Fault(method, pattern, "hang_up", times))

    def lose(self, method: str, pattern: str, times: int = 1) -> Fault:
        """Do what the next matching requests ask for, but close the connection instead of answering."""
        return self._order(Fault(method, pattern, "lose", times))

    def cut(self, method: str, pattern: str, times: int = 1) -> Fault:
        """Send half of the answer to the next matching requests, and close the connection."""
        return self._order(Fault(method, pattern, "cut", times))

    def _order(self, fault: Fault) -> Fault:
        with self.lock:
            self.faults.append(fault)
        return fault

    def fault_for(self, method: str, path: str, body: bytes | None) -> Fault | None:
        """The fault that applies to a request; it counts as met."""
        with self.lock:
            for fault in self.faults:
                if fault.concerns(method, path, body):
                    fault.met += 1
                    return fault
        return None

    # ---- who may do what ---------------------------------------------------------------------------------------------

    def user_of(self, headers: Any) -> User | None:
        given = headers.get("Authorization")
        if given is None:
            return None
        user = self.users.get(given.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def _readable(self, request: Request, *, contents: bool = False) -> Repository:
        repository = self.repositories.get(request.groups["id"])
        user = request.user
        is_member = user is not None and repository is not None and repository.namespace in user.namespaces
        if repository is None or (repository.private and not is_member):
            # The Hub does not tell strangers whether a repository exists.
            if user is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if contents and repository.gated and not is_member:
            raise Refused(403 if user else 401, f"Access to model {repository.name} is restricted.", "GatedRepo")
        return repository

    def _writable(self, request: Request, *, create_pr: bool = False) -> Repository:
        repository = self._readable(request)
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        if not create_pr:
            self._check_namespace(request.user, repository.namespace)
        return repository

    def _check_namespace(self, user: User, namespace: str) -> None:
        if user.role != "write" or namespace not in user.namespaces:
            raise Refused(403, f"You don't have the rights to write under the namespace {namespace!r}")

    # ---- the Hub -----------------------------------------------------------------------------------------------------

    def _hub_routes(self) -> list[Route]:
        api = f"/api/models/{_ID}"
        table = {
            ("GET", "/api/whoami-v2"): self._whoami,
            ("POST", "/api/repos/create"): self._create,
            ("DELETE", "/api/repos/delete"): self._delete,
            ("POST", "/api/validate-yaml"): self._validate,
            ("GET", api): self._info,
            ("GET", f"{api}/revision/{_REVISION}"): self._info,
            ("GET", f"{api}/refs"): self._refs,
            ("GET", f"{api}/commits/{_REVISION}"): self._commits,
            ("GET", f"{api}/tree/{_REVISION}(/(?P<folder>.+))?"): self._tree,
            ("POST", f"{api}/paths-info/{_REVISION}"): self._paths,
            ("POST", f"{api}/branch/{_REVISION}"): self._create_branch,
            ("DELETE", f"{api}/branch/{_REVISION}"): self._delete_branch,
            ("POST", f"{api}/tag/{_REVISION}"): self._create_tag,
            ("POST", f"{api}/preupload/{_REVISION}"): self._preupload,
            ("POST", f"{api}/commit/{_REVISION}"): self._commit,
            ("GET", f"/{_ID}/(resolve|raw)/{_REVISION}/(?P<path>.+)"): self._resolve,
            ("POST", rf"/{_ID}\.git/info/lfs/objects/batch"): self._batch,
            ("POST", rf"/{_ID}\.git/info/lfs/verify"): self._verify,
            ("POST", "/api/complete_multipart/(?P<ticket>[^/]+)"): self._complete,
            # Not a part of the protocol: by this request a failed client says that it tries again.
            ("POST", f"/loopback/repair/{_ID}"): self._repair,
        }
        return [(method, re.compile(pattern), function) for (method, pattern), function in table.items()]

    def _repair(self, request: Request) -> Answer:
        self.faults = [fault for fault in self.faults if request.groups["id"] not in fault.pattern]
        return Answer()

    def _whoami(self, request: Request) -> Answer:
        user = request.user
        if user is None:
            raise Refused(401, "Invalid username or password.")
        token = {"displayName": "tests", "role": user.role}
        organizations = [{"type": "org", "name": name} for name in user.organizations]
        auth = {"type": "access_token", "accessToken": token}
        return Answer.json({"type": "user", "name": user.name, "orgs": organizations, "auth": auth})

    def _create(self, request: Request) -> Answer:
        asked = request.json()
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        if asked.get("type", "model") != "model" or not re.fullmatch(r"[\w.-]{1,96}", asked.get("name", "")):
            raise Refused(400, f"This is not a name for a model repository: {asked.get('name')!r}")
        namespace = asked.get("organization") or request.user.name
        self._check_namespace(request.user, namespace)
        name = f"{namespace}/{asked['name']}"
        url = f"{self.url}/{name}"
        if name in self.repositories:
            return Answer.json({"error": "You already created this model repo", "url": url}, status=409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repositories[name] = Repository(name, private)
        return Answer.json({"url": url, "name": name})

    def _delete(self, request: Request) -> Answer:
        asked = request.json()
        owner = asked.get("organization") or (request.user.name if request.user else "")
        request.groups["id"] = f"{owner}/{asked.get('name')}"
        del self.repositories[self._writable(request).name]
        return Answer.json({})

    def _validate(self, request: Request) -> Answer:
        errors, warnings = card_problems(request.json().get("content", ""))
        found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
        return Answer.json(found, status=400 if errors else 200)

    def _info(self, request: Request) -> Answer:
        repository = self._readable(request)
        commit = repository.at(request.groups.get("revision", "main"))
        described = {
            "id": repository.name,
            "modelId": repository.name,
            "author": repository.namespace,
            "sha": commit.id,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }
        return Answer.json(described)

    def _refs(self, request: Request) -> Answer:
        found: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        kinds = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
        for ref, commit in self._readable(request).refs.items():
            _, kind, name = ref.split("/", 2)
            found[kinds[kind]].append({"name": name, "ref": ref, "targetCommit": commit.id})
        return Answer.json(found)

    def _commits(self, request: Request) -> Answer:
        head = self._readable(request).at(request.groups["revision"])
        return Answer.json(
            [
                {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
                for c in head.history()
            ]
        )

    def _tree(self, request: Request) -> Answer:
        commit = self._readable(request).at(request.groups["revision"])
        folder = request.groups.get("folder") or ""
        if folder and folder not in commit.folders():
            raise Refused(404, f"{folder} does not exist on {request.groups['revision']!r}", "EntryNotFound")
        entries = _entries(commit, folder, request.query.get("recursive", ["false"])[0].lower() == "true")
        start = int(request.query.get("cursor", ["0"])[0])
        page, headers = entries[start : start + self.page_size], {}
        if start + self.page_size < len(entries):
            asked = "&".join(f"{k}={quote(v[0])}" for k, v in request.query.items() if k != "cursor")
            headers = {"Link": f'<{self.url}{request.path}?{asked}&cursor={start + self.page_size}>; rel="next"'}
        return Answer.json(page, **headers)

    def _paths(self, request: Request) -> Answer:
        commit = self._readable(request).at(request.groups["revision"])
        is_form = request.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
        asked = parse_qs(request.body.decode()).get("paths", []) if is_form else request.json().get("paths", [])
        entries = {entry["path"]: entry for entry in _entries(commit, "", recursive=True)}
        return Answer.json([entries[path] for path in asked if path in entries])

    def _create_branch(self, request: Request) -> Answer:
        branch = request.groups["revision"]
        if branch.startswith("refs/"):
            raise Refused(400, f"Invalid reference for a branch: {branch}")
        start = request.json().get("startingPoint", "main")
        self._writable(request).create_ref(f"refs/heads/{branch}", start)
        return Answer.json({})

    def _delete_branch(self, request: Request) -> Answer:
        self._writable(request).delete_branch(request.groups["revision"])
        return Answer.json({})

    def _create_tag(self, request: Request) -> Answer:
        self._writable(request).create_ref(f"refs/tags/{request.json()['tag']}", request.groups["revision"])
        return Answer.json({})

    def _resolve(self, request: Request) -> Answer:
        repository = self._readable(request, contents=True)
        revision, path = request.groups["revision"], request.groups["path"]
        file, commit = repository.file(revision, path), repository.at(revision)
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if not file.is_large:
            return ranged(request, Answer(file.data, 200, headers))
        ticket = secrets.token_hex(16)
        self._downloads[ticket] = file
        address = f"{self.storage_url}/{repository.name}/download/{ticket}/{quote(path.rsplit('/', 1)[-1])}"
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        return Answer(b"", 302, headers | linked | {"Location": address})

    # ---- a push ------------------------------------------------------------------------------------------------------

    def _preupload(self, request: Request) -> Answer:
        create_pr = "create_pr" in request.query
        commit = self._writable(request, create_pr=create_pr).at(request.groups["revision"])
        modes = []
        for asked in request.json()["files"]:
            path = checked_path(asked["path"])
            mode = "lfs" if is_large(path, asked["size"], base64.b64decode(asked["sample"])) else "regular"
            present = commit.files.get(path)
            found = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            modes.append(found | ({"oid": present.etag} if present else {}))
        return Answer.json({"files": modes, "commitOid": commit.id})

    def _batch(self, request: Request) -> Answer:
        # Everyone who may open a pull request may upload files for it.
        repository = self._writable(request, create_pr=True)
        asked = request.json()
        if asked.get("operation") != "upload" or asked.get("hash_algo") != "sha256":
            raise Refused(422, "Uploads only, with sha256")
        return Answer.json({"transfer": "basic", "objects": [self._actions(repository, o) for o in asked["objects"]]})

    def _actions(self, repository: Repository, asked: dict[str, Any]) -> dict[str, Any]:
        oid, size = asked["oid"], asked["size"]
        if not re.fullmatch("[0-9a-f]{64}", oid) or not isinstance(size, int) or size < 1:
            return asked | {"error": {"code": 422, "message": "This is not a sha256 with a size"}}
        if oid in repository.large:
            return {"oid": oid, "size": size}
        ticket = secrets.token_hex(16)
        self._uploads[ticket] = _Upload(repository, oid, size)
        address = f"{self.storage_url}/{repository.name}/upload/{ticket}"
        upload: dict[str, Any] = {"href": address}
        if size > self.part_size:
            count = math.ceil(size / self.part_size)
            parts = {str(n): f"{address}/{n}" for n in range(1, count + 1)}
            completion = f"{self.url}/api/complete_multipart/{ticket}"
            upload = {"href": completion, "header": {"chunk_size": str(self.part_size), **parts}}
        verify = {"href": f"{self.url}/{repository.name}.git/info/lfs/verify"}
        return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}

    def _complete(self, request: Request) -> Answer:
        upload, asked = self._upload(request), request.json()
        named = {part["partNumber"]: part["etag"] for part in asked["parts"]}
        if named != {n: _etag(data) for n, data in upload.parts.items()} or asked["oid"] != upload.sha256:
            raise Refused(400, "The parts are not those that were uploaded")
        upload.keep(b"".join(upload.parts[n] for n in sorted(upload.parts)))
        return Answer.json({})

    def _verify(self, request: Request) -> Answer:
        repository, asked = self._writable(request, create_pr=True), request.json()
        for upload in self._uploads.values():
            same = upload.repository is repository and (upload.sha256, upload.size) == (asked["oid"], asked["size"])
            if same and upload.data is not None:
                repository.large[upload.sha256] = upload.data
                return Answer.json({})
        raise Refused(404, f"Nothing of that size was uploaded under {asked['oid']}")

    def _commit(self, request: Request) -> Answer:
        if not request.headers.get("Content-Type", "").startswith("application/x-ndjson"):
            raise Refused(400, "A commit is sent as application/x-ndjson")
        create_pr = "create_pr" in request.query
        repository = self._writable(request, create_pr=create_pr)
        try:
            lines = [json.loads(line) for line in request.body.splitlines()]
        except ValueError as error:
            raise Refused(400, f"A line of the commit is not JSON: {error}") from error
        assert request.user is not None
        commit, number = repository.commit(request.groups["revision"], lines, request.user.name, create_pr)
        url = f"{self.url}/{repository.name}"
        done: dict[str, Any] = {"success": True, "commitOid": commit.id, "commitUrl": f"{url}/commit/{commit.id}"}
        if number is not None:
            done["pullRequestUrl"] = f"{url}/discussions/{number}"
        return Answer.json(done)

    # ---- storage of large files --------------------------------------------------------------------------------------

    def _storage_routes(self) -> list[Route]:
        ticket = "(?P<ticket>[^/]+)"
        table = {
            ("PUT", f"/{_ID}/upload/{ticket}"): self._put,
            ("PUT", f"/{_ID}/upload/{ticket}/(?P<part>[0-9]+)"): self._put_part,
            ("GET", f"/{_ID}/download/{ticket}/[^/]+"): self._download,
        }
        return [(method, re.compile(pattern), function) for (method, pattern), function in table.items()]

    def _upload(self, request: Request) -> _Upload:
        upload = self._uploads.get(request.groups["ticket"])
        if upload is None:
            raise Refused(403, "This address was never given out")
        return upload

    def _put(self, request: Request) -> Answer:
        self._upload(request).keep(request.body)
        return Answer(headers={"ETag": _etag(request.body)})

    def _put_part(self, request: Request) -> Answer:
        self._upload(request).parts[int(request.groups["part"])] = request.body
        return Answer(headers={"ETag": _etag(request.body)})

    def _download(self, request: Request) -> Answer:
        file = self._downloads.get(request.groups["ticket"])
        if file is None:
            raise Refused(403, "This address was never given out")
        return ranged(request, Answer(file.data, 200, {"ETag": f'"{file.sha256}"', "Accept-Ranges": "bytes"}))


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _entries(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    entries = [{"type": "directory", "oid": oid, "size": 0, "path": path} for path, oid in commit.folders().items()]
    entries += [file.entry(path) for path, file in sorted(commit.files.items())]
    inside = [entry for entry in entries if entry["path"].startswith(prefix)]
    return [entry for entry in inside if recursive or "/" not in entry["path"].removeprefix(prefix)]
