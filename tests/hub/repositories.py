"""Model repositories in memory: commits, branches, pull requests and large files, as the Hub keeps them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id

MAIN = "refs/heads/main"
# The largest file, in bytes, that the Hub keeps in git; larger files, and binary files of any size, must be LFS files.
REGULAR_LIMIT = 10_000_000
_LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".pkl", ".npz", ".zip")
_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LARGE_SUFFIXES)


class Refused(Exception):
    """An answer with an error.

    Attributes:
        status: The HTTP status.
        code: `X-Error-Code`, from which the client chooses an exception.
        headers: Additional headers.
    """

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    data: bytes
    is_large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """The text that git keeps in the place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        """The name that git gives to the blob."""
        blob = self.pointer if self.is_large else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        """The entry of the file in answers to `tree` and `paths-info`."""
        found: dict[str, Any] = {"type": "file", "oid": self.oid, "size": len(self.data), "path": path}
        if self.is_large:
            found["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return found


@dataclass(frozen=True)
class Commit:
    id: str
    title: str
    message: str
    author: str
    date: str
    parent: Commit | None
    files: Mapping[str, File] = field(repr=False)

    def history(self) -> Iterable[Commit]:
        """This commit and all before it, the last one first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def folders(self) -> dict[str, str]:
        """Each folder with a hash of its contents."""
        found: dict[str, list[str]] = {}
        for path, file in sorted(self.files.items()):
            parts = path.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                found.setdefault("/".join(parts[:depth]), []).append(f"{path} {file.oid}")
        return {folder: hashlib.sha1("\n".join(rows).encode()).hexdigest() for folder, rows in found.items()}


class Repository:
    """A model repository. A commit becomes visible only when it is complete.

    Args:
        name: `namespace/name`.
        private: Only members of the namespace see it.
    """

    def __init__(self, name: str, private: bool = False) -> None:
        self.name, self.private, self.gated = name, private, False
        self.namespace = name.split("/")[0]
        # The uploaded and verified contents of large files; a commit names them by their sha256.
        self.large: dict[str, bytes] = {}
        self._serial = itertools.count()
        first = self._commit(None, {".gitattributes": File(_ATTRIBUTES.encode())}, "initial commit", "", "system")
        self.refs = {MAIN: first}

    @property
    def head(self) -> Commit:
        return self.refs[MAIN]

    @property
    def pull_requests(self) -> list[int]:
        return [int(ref.rsplit("/", 1)[1]) for ref in self.refs if ref.startswith("refs/pr/")]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a pull request or a commit id stands for."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        for head in self.refs.values():
            for commit in head.history():
                if commit.id == revision:
                    return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def file(self, revision: str, path: str) -> File:
        commit = self.at(revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.id)
        return commit.files[path]

    def create_ref(self, ref: str, start: str) -> None:
        if ref in self.refs:
            raise Refused(409, f"Reference already exists: {ref}")
        self.refs[ref] = self.at(start)

    def delete_branch(self, branch: str) -> None:
        if branch == "main" or f"refs/heads/{branch}" not in self.refs:
            raise Refused(403 if branch == "main" else 404, f"The branch {branch} cannot be deleted")
        del self.refs[f"refs/heads/{branch}"]

    def commit(self, revision: str, lines: list[Any], author: str, create_pr: bool) -> tuple[Commit, int | None]:
        """Carry out a commit, or nothing if it is refused; returns it and the number of its pull request."""
        header = _header_of(lines)
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref not in self.refs:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent = self.refs[ref]
        if header.get("parentCommit") not in (None, parent.id):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines[1:]:
            self._apply(line, files)
        done = self._commit(parent, files, header["summary"], header.get("description") or "", author)
        number = max(self.pull_requests, default=0) + 1 if create_pr else None
        self.refs[f"refs/pr/{number}" if create_pr else ref] = done
        return done, number

    def _apply(self, line: Any, files: dict[str, File]) -> None:
        if not isinstance(line, dict) or not isinstance(line.get("value"), dict):
            raise Refused(400, f"Every line of a commit has a key and a value: {str(line)[:80]!r}")
        key, value = line.get("key"), line["value"]
        path = checked_path(value.get("path"))
        if key == "file":
            files[path] = _regular(path, value)
        elif key == "lfsFile":
            files[path] = self._large(path, value)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif key == "deletedFolder":
            inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
            if not inside:
                raise Refused(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
            for name in inside:
                del files[name]
        else:
            raise Refused(400, f"Unknown operation of a commit: {key!r}")

    def _large(self, path: str, value: dict[str, Any]) -> File:
        data = self.large.get(value.get("oid", ""))
        if value.get("algo") != "sha256" or data is None:
            raise Refused(400, f"An LFS pointer pointed to a file that does not exist. Offending file: {path}")
        if value.get("size", len(data)) != len(data):
            raise Refused(400, f"{path} has {len(data)} bytes, and the commit says {value['size']}")
        return File(data, is_large=True)

    def _commit(self, parent: Commit | None, files: dict[str, File], title: str, message: str, author: str) -> Commit:
        date = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        content = [parent.id if parent else "", title, message, author, date, str(next(self._serial)), self.name]
        content += [f"{path} {file.oid}" for path, file in sorted(files.items())]
        name = hashlib.sha1("\0".join(content).encode()).hexdigest()
        return Commit(name, title, message, author, date, parent, files)


def _header_of(lines: list[Any]) -> dict[str, Any]:
    headers = [line.get("value") for line in lines if isinstance(line, dict) and line.get("key") == "header"]
    if len(headers) != 1 or not isinstance(lines[0], dict) or lines[0].get("key") != "header":
        raise Refused(400, "A commit starts with one header")
    if not isinstance(headers[0], dict) or not headers[0].get("summary"):
        raise Refused(400, "The header of a commit has a summary")
    return headers[0]


def _regular(path: str, value: dict[str, Any]) -> File:
    if value.get("encoding") != "base64":
        raise Refused(400, f"{path}: the encoding of a file is base64")
    try:
        data = base64.b64decode(value.get("content", ""), validate=True)
    except (binascii.Error, TypeError) as error:
        raise Refused(400, f"{path}: the content is not base64") from error
    if is_large(path, len(data), data[:512]) and data:
        raise Refused(400, f"Your push was rejected because it contains binary files: {path}")
    if path == "README.md":
        errors, _ = card_problems(data.decode())
        if errors:
            raise Refused(400, "; ".join(errors))
    return File(data)


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub demands that a file is uploaded as a large one."""
    return path.endswith(_LARGE_SUFFIXES) or size > REGULAR_LIMIT or b"\0" in sample


def checked_path(path: Any) -> str:
    """The path, if it can be one inside a repository."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if {"", ".", "..", ".git"} & set(parts[:-1] if parts[-1] == "" and len(parts) > 1 else parts):
        raise Refused(400, f"Invalid path in a repository: {path!r}")
    return str(path)


def card_problems(content: str) -> tuple[list[str], list[str]]:
    """The errors and warnings that the Hub gives for a card's metadata."""
    match = REGEX_YAML_BLOCK.search(content)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match.group(2))
        if data is None:
            return [], ["empty or missing yaml metadata in repo card"]
        if not isinstance(data, dict):
            return ["the metadata of a card is a mapping"], []
        ModelCard(content, ignore_metadata_errors=False)
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        return [f"{type(error).__name__}: {error}"], []
    return _field_problems(data), []


def _field_problems(data: dict[str, Any]) -> list[str]:
    errors = []
    for name in ("license", "library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for name in ("tags", "metrics"):
        values = data.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{name}" must be an array of strings')
    for name in ("base_model", "datasets"):
        values = data.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if _bad(value):
                errors.append(f'"{name}" with value "{value}" is not valid. Use an id of the Hub.')
    return errors


def _bad(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False
