"""The loopback Hub itself against the real client, since the other tests of this folder rely on it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, RepoCard, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.loopback import LoopbackHub

pytestmark = pytest.mark.usefixtures("online")
NAME = "alice/adapter"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_alice")


@pytest.fixture
def bob(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_bob")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a card, a configuration, weights and a folder inside."""
    folder = tmp_path / "folder"
    (folder / "plots").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: peft\ntags: [debiasing]\n---\n# Card\n")
    (folder / "adapter_config.json").write_text("{}")
    (folder / WEIGHTS).write_bytes(os.urandom(5000))
    (folder / "plots" / "leakage.png").write_bytes(b"\x89PNG\0" + os.urandom(100))
    return folder


def contents_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != ".gitattributes"}


def asked(hub: LoopbackHub, method: str, words: str) -> list[int]:
    """The statuses of all answers to requests with this method and these words."""
    return [status for m, path, status in hub.requests if m == method and words in path]


def raw(hub: LoopbackHub, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, str]:
    """The answer to a request that does not follow the protocol."""
    headers = {"Content-Type": content_type, "Authorization": "Bearer hf_alice"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{hub.url}{path}", body, headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def commit(hub: LoopbackHub, *operations: dict[str, Any], **header: str) -> tuple[int, str]:
    lines = [{"key": "header", "value": {"summary": "by hand", "description": "", **header}}, *operations]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return raw(hub, f"/api/models/{NAME}/commit/main", body, "application/x-ndjson")


def regular(path: str, data: bytes) -> dict[str, Any]:
    content = base64.b64encode(data).decode()
    return {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}


# ---- push and pull ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_size", [1 << 20, 1024], ids=["whole", "in parts"])
def test_a_folder_goes_up_and_comes_back(api: HfApi, hub: LoopbackHub, folder: Path, tmp_path: Path, part_size: int):
    hub.part_size = part_size
    assert api.create_repo(NAME).repo_id == NAME
    info = api.upload_folder(repo_id=NAME, folder_path=folder, commit_message="First")
    pulled = snapshot_download(NAME, endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert contents_of(Path(pulled)) == contents_of(folder) == hub.contents(NAME)
    assert Path(pulled).name == info.oid == hub.repository(NAME).head.id
    assert [found.title for found in api.list_repo_commits(NAME)] == ["First", "initial commit"]
    # The weights went to the storage, the configuration into the commit.
    assert len(asked(hub, "PUT", "/upload/")) == 1 + (1 if part_size > 5000 else 5)
    assert not hub.trouble


def test_what_has_not_changed_is_not_sent_again(api: HfApi, hub: LoopbackHub, folder: Path):
    api.create_repo(NAME)
    api.upload_folder(repo_id=NAME, folder_path=folder)
    head, sent = hub.repository(NAME).head, len(asked(hub, "PUT", "/upload/"))
    assert api.upload_folder(repo_id=NAME, folder_path=folder).oid == head.id
    assert hub.repository(NAME).head is head
    (folder / "adapter_config.json").write_text('{"r": 1}')
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert hub.contents(NAME)["adapter_config.json"] == b'{"r": 1}'
    assert len(asked(hub, "PUT", "/upload/")) == sent


def test_revisions_are_kept(api: HfApi, hub: LoopbackHub, tmp_path: Path):
    def push(data: bytes, **where: Any) -> Any:
        return api.upload_file(path_or_fileobj=data, path_in_repo="a.bin", repo_id=NAME, **where)

    def pull(revision: str | None) -> bytes:
        found = hf_hub_download(NAME, "a.bin", revision=revision, endpoint=hub.url, cache_dir=tmp_path)
        return Path(found).read_bytes()

    api.create_repo(NAME)
    first = push(b"first")
    api.create_branch(NAME, branch="dev/one")
    api.create_tag(NAME, tag="v1")
    push(b"on the branch", revision="dev/one")
    push(b"second")
    proposed = push(b"proposed", create_pr=True)
    found = [pull(revision) for revision in (first.oid, "v1", "dev/one", None, "main", proposed.pr_revision)]
    assert found == [b"first", b"first", b"on the branch", b"second", b"second", b"proposed"]
    with pytest.raises(RevisionNotFoundError):
        pull("nowhere")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(NAME, branch="dev/one")
    with pytest.raises(HfHubHTTPError, match="412"):
        push(b"third", parent_commit=first.oid)
    assert api.list_repo_refs(NAME, include_pull_requests=True).pull_requests[0].ref == proposed.pr_revision


def test_a_tree_comes_in_pages(api: HfApi, hub: LoopbackHub, folder: Path):
    hub.page_size = 2
    api.create_repo(NAME)
    api.upload_folder(repo_id=NAME, folder_path=folder)
    files = {".gitattributes", *contents_of(folder)}
    assert {entry.path for entry in api.list_repo_tree(NAME, recursive=True)} == files | {"plots"}
    assert [entry.path for entry in api.list_repo_tree(NAME, "plots")] == ["plots/leakage.png"]
    described = {entry.path: entry for entry in api.get_paths_info(NAME, [WEIGHTS, "README.md", "missing"])}
    assert described.keys() == {WEIGHTS, "README.md"}
    assert described[WEIGHTS].lfs.sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert described["README.md"].lfs is None


def test_without_the_server_there_is_the_cache(api: HfApi, hub: LoopbackHub, tmp_path: Path):
    api.create_repo(NAME)
    api.upload_file(path_or_fileobj=b"kept", path_in_repo="a.bin", repo_id=NAME)
    where: dict[str, Any] = {"endpoint": hub.url, "cache_dir": tmp_path}
    hf_hub_download(NAME, "a.bin", **where)
    hub.stop()
    assert Path(hf_hub_download(NAME, "a.bin", **where)).read_bytes() == b"kept"
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(NAME, "b.bin", **where)


# ---- who may do what -------------------------------------------------------------------------------------------------


def test_strangers_see_nothing_of_a_private_repository(api: HfApi, bob: HfApi, hub: LoopbackHub, tmp_path: Path):
    api.create_repo(NAME, private=True)
    api.upload_file(path_or_fileobj=b"secret", path_in_repo="a.bin", repo_id=NAME)
    for token in ("hf_bob", False):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(NAME, "a.bin", token=token, endpoint=hub.url, cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        bob.model_info(NAME)
    assert api.model_info(NAME).private
    assert hf_hub_download(NAME, "a.bin", token="hf_alice", endpoint=hub.url, cache_dir=tmp_path)


def test_each_refusal_has_the_exception_that_the_client_has_for_it(api: HfApi, bob: HfApi, hub: LoopbackHub):
    api.create_repo(NAME)
    api.create_repo("lab/shared")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(NAME)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/other")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(NAME, "missing")
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.create_repo("alice/mine")
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=NAME)
    # Everyone may propose a change.
    assert bob.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=NAME, create_pr=True).pr_num == 1
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.url, token="hf_wrong").model_info(NAME)
    hub.repository(NAME).gated = True
    with pytest.raises(GatedRepoError):
        bob.hf_hub_download(NAME, ".gitattributes")


# ---- what is not a commit -------------------------------------------------------------------------------------------

POINTER = {"path": WEIGHTS, "algo": "sha256", "oid": hashlib.sha256(b"weights").hexdigest(), "size": 7}


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ({"key": "lfsFile", "value": POINTER}, "does not exist"),
        (regular(WEIGHTS, b"weights"), "binary files"),
        (regular("notes", b"\0"), "binary files"),
        (regular("../notes", b"x"), "Invalid path"),
        (regular("README.md", b"---\ntags: {a: [\n---\n"), "ParserError"),
        ({"key": "deletedFile", "value": {"path": "missing"}}, "doesn't exist"),
        ({"key": "header", "value": {"summary": "again"}}, "one header"),
        ({"key": "moved", "value": {"path": "a"}}, "Unknown operation"),
    ],
)
def test_half_of_a_commit_is_none(api: HfApi, hub: LoopbackHub, operation: dict[str, Any], words: str):
    api.create_repo(NAME)
    head = hub.repository(NAME).head
    status, text = commit(hub, regular("good.txt", b"good"), operation)
    assert status in (400, 404) and words in text
    assert hub.repository(NAME).head is head
    assert commit(hub, regular("good.txt", b"good"))[0] == 200


def test_what_was_uploaded_is_what_was_announced(api: HfApi, hub: LoopbackHub):
    api.create_repo(NAME)
    batch = {"operation": "upload", "hash_algo": "sha256", "objects": [{"oid": POINTER["oid"], "size": 7}]}
    _, text = raw(hub, f"/{NAME}.git/info/lfs/objects/batch", json.dumps(batch).encode())
    address = json.loads(text)["objects"][0]["actions"]["upload"]["href"]

    def put(data: bytes, **headers: str) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, data, headers, method="PUT")) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def verify() -> int:
        return raw(hub, f"/{NAME}.git/info/lfs/verify", json.dumps({"oid": POINTER["oid"], "size": 7}).encode())[0]

    assert put(b"wights") == put(b"weighty") == 400
    assert put(b"weights", Authorization="Bearer hf_alice") == 400  # a token that has left the Hub
    assert verify() == 404
    assert put(b"weights") == 200
    # The file is uploaded but not verified.
    assert commit(hub, {"key": "lfsFile", "value": POINTER})[0] == 400
    assert verify() == 200
    assert commit(hub, {"key": "lfsFile", "value": POINTER | {"size": 8}})[0] == 400
    assert commit(hub, {"key": "lfsFile", "value": POINTER})[0] == 200
    assert hub.contents(NAME) == {WEIGHTS: b"weights"}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("library_name: peft\nbase_model: alice/base\ntags: [a]", None),
        ("base_model: /home/alice/base", "base_model"),
        ("tags: debiasing", "must be an array"),
        ("library_name: [peft]", "library_name"),
        ("model-index: 3", "model_index"),
        ("- a list", "mapping|dict"),
        ("a: b: c", "ScannerError|mapping values"),
    ],
)
def test_metadata_of_a_card_is_read(hub: LoopbackHub, monkeypatch, metadata: str, words: str | None):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    card = RepoCard("# Card")
    card._content = f"---\n{metadata}\n---\n# Card\n"
    monkeypatch.setattr(RepoCard, "__str__", lambda self: self._content)
    if words is None:
        card.validate(repo_type="model")
    else:
        with pytest.raises(ValueError, match=words):
            card.validate(repo_type="model")


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_fault_is_met_as_often_as_it_was_ordered(api: HfApi, hub: LoopbackHub, folder: Path, tmp_path, monkeypatch):
    api.create_repo(NAME)
    busy = hub.answer("POST", "/objects/batch", 503, times=2)
    torn = hub.hang_up("PUT", "/upload/", times=2)
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert (busy.met, torn.met) == (2, 2)
    assert hub.contents(NAME) == contents_of(folder)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    cut = hub.cut("GET", f"/download/.*/{WEIGHTS}")
    found = hf_hub_download(NAME, WEIGHTS, endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert Path(found).read_bytes() == (folder / WEIGHTS).read_bytes()
    # The client requests only the rest.
    assert cut.met == 1 and asked(hub, "GET", f"/{WEIGHTS}") == [200, -200, 206]


def test_a_lost_answer_is_no_lost_commit(api: HfApi, hub: LoopbackHub):
    api.create_repo(NAME)
    hub.lose("POST", "/commit/main")
    with pytest.raises(Exception, match="disconnected"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="a.bin", repo_id=NAME)
    head = hub.repository(NAME).head
    assert hub.contents(NAME) == {"a.bin": b"x"}
    assert api.upload_file(path_or_fileobj=b"x", path_in_repo="a.bin", repo_id=NAME).oid == head.id
