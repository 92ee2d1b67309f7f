"""The loopback Hub, as an unmodified huggingface_hub sees it.

What holds of the protocol is tested on a real Hub too for those who ask for it; see `live_hub.py`.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hub_server import HubServer
from hub_server.shards import chunk_offsets, decompress_lz4
from live_hub import Place, run_client

TRANSPORTS = pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
README = "---\nlicense: mit\nlibrary_name: peft\nbase_model: org/base\ntags: [loram]\n---\n# Hello\n"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", multipart_bytes=1 << 20) as hub:
        yield hub


def contents(seed: int = 0) -> dict[str, bytes]:
    """Files of every sort: regular, empty, nested, and weights that compress well, a little, and not at all."""
    rng = random.Random(seed)
    return {
        "README.md": README.encode(),
        "config.json": json.dumps({"seed": seed}).encode(),
        "empty.txt": b"",
        "noise.safetensors": rng.randbytes(1_500_001),
        "sub/repeats.safetensors": rng.randbytes(1000) * 300 + bytes(200_000),
        "sub/folder/weights.safetensors": struct.pack("<100000f", *(rng.gauss(0, 0.02) for _ in range(100_000))),
    }


def save(folder: Path, files: Mapping[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def read(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def fetch(
    url: str, *, method: str = "GET", body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Mapping[str, str], bytes]:
    """Make one request without following redirects."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=20)
    try:
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request(method, target, body, dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


ALICE = {"Authorization": "Bearer hf_alice_write"}


# --- the protocol, here and on a real Hub


@TRANSPORTS
def test_what_is_uploaded_by_either_transport_is_what_is_downloaded_by_both(place: Place, xet: bool) -> None:
    files, repo = contents(), place.new_repo()
    source = save(place.home / "source", files)

    pushed = place.client(
        """
        repo, source = sys.argv[1:]
        api.create_repo(repo, private=True)
        again = api.create_repo(repo, private=True, exist_ok=True)
        first = api.upload_folder(repo_id=repo, folder_path=source, commit_message="One")
        second = api.upload_folder(repo_id=repo, folder_path=source, commit_message="Two")
        info = api.model_info(repo, files_metadata=True)
        entries = [f for f in api.list_repo_tree(repo, recursive=True) if isinstance(f, RepoFile)]
        answer({
            "url": again.repo_id, "oids": [first.oid, second.oid, info.sha], "tags": info.tags,
            "private": info.private, "gated": info.gated, "card": info.card_data.to_dict(),
            "titles": [commit.title for commit in api.list_repo_commits(repo)],
            "tree": {f.path: [f.size, f.blob_id, f.lfs and f.lfs.sha256, bool(f.xet_hash)] for f in entries},
            "siblings": {f.rfilename: f.size for f in info.siblings},
            "top": sorted(f.path for f in api.list_repo_tree(repo)),
            "paths": [type(f).__name__ for f in api.get_paths_info(repo, ["sub", "config.json", "nothing"])],
            "exists": [api.file_exists(repo, "config.json"), api.file_exists(repo, "nothing"),
                       api.revision_exists(repo, first.oid[:12]), api.revision_exists(repo, "nothing"),
                       api.repo_exists(repo), api.repo_exists(repo + "-not")],
        })
        """,
        repo,
        source,
        xet=xet,
    )
    pulled = [
        place.client(
            "repo, commit = sys.argv[1:]\n"
            "folder = snapshot_download(repo, revision=commit)\n"
            "checked = api.verify_repo_checksums(repo, revision=commit)\n"
            "answer([folder, checked.checked_count, len(checked.mismatches) + len(checked.missing_paths)])",
            repo,
            pushed["oids"][0],
            xet=reader,
            home=f"reader-{reader}",
        )
        for reader in (False, True)
    ]

    assert pushed["url"] == repo
    assert len(set(pushed["oids"])) == 1, "an upload of the same files makes no commit"
    assert pushed["titles"] == ["One", "initial commit"]
    assert (pushed["private"], pushed["gated"], pushed["card"]["base_model"]) == (True, False, "org/base")
    assert {"loram", "license:mit", "peft"} <= set(pushed["tags"])
    assert pushed["exists"] == [True, False, True, False, True, False]
    assert pushed["top"] == [".gitattributes", "README.md", "config.json", "empty.txt", "noise.safetensors", "sub"]
    assert sorted(pushed["paths"]) == ["RepoFile", "RepoFolder"]
    tree = pushed["tree"]
    assert set(tree) == set(pushed["siblings"]) == {*files, ".gitattributes"}
    for path, data in files.items():
        size, oid, sha256, has_xet = tree[path]
        assert size == pushed["siblings"][path] == len(data)
        if path.endswith(".safetensors"):
            assert sha256 == hashlib.sha256(data).hexdigest()
            assert has_xet or not xet
        else:
            assert (oid, sha256) == (hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), None)
    for folder, checked, wrong in pulled:
        found = read(folder)
        found.pop(".gitattributes")
        assert found == files
        assert (checked, wrong) == (len(files) + 1, 0)


@TRANSPORTS
def test_refs_are_made_moved_and_removed_as_git_would(place: Place, xet: bool) -> None:
    repo = place.new_repo()

    got = place.client(
        """
        repo = sys.argv[1]
        add = lambda path, data: CommitOperationAdd(path, data)
        commit = lambda *operations, **more: api.create_commit(repo, operations, commit_message="m", **more)
        files = lambda revision: sorted(set(api.list_repo_files(repo, revision=revision)) - {".gitattributes"})
        api.create_repo(repo, private=True)
        first = commit(add("a.txt", b"a"), add("deep/b.txt", b"b")).oid
        got = {}
        api.create_branch(repo, branch="side/one")
        got["branch twice"] = refusal(api.create_branch, repo, branch="side/one")
        got["branch of a ref"] = refusal(api.create_branch, repo, branch="refs/pr/7")
        side = commit(add("w.safetensors", b"0" * 3000), add("c.txt", b"c"), revision="side/one").oid
        got["main before"] = files("main")
        got["stale parent"] = refusal(commit, add("x.txt", b"x"), parent_commit=side)
        got["no such branch"] = refusal(commit, add("x.txt", b"x"), revision="nothing")
        got["half a commit"] = refusal(commit, add("x.txt", b"x"), CommitOperationDelete("nothing.txt"))
        got["main untouched"] = files("main")
        copied = commit(CommitOperationCopy("w.safetensors", "w.safetensors", src_revision="side/one"),
                        CommitOperationCopy("c.txt", "copied/c.txt", src_revision=side),
                        CommitOperationDelete("deep/"), parent_commit=first).oid
        got["main after"] = files("main")
        got["copied"] = [Path(hf_hub_download(repo, "w.safetensors")).read_text() == "0" * 3000,
                         Path(hf_hub_download(repo, "copied/c.txt")).read_text()]
        api.create_tag(repo, tag="v1", revision=first)
        got["tag twice"] = refusal(api.create_tag, repo, tag="v1")
        api.create_tag(repo, tag="v1", exist_ok=True)
        got["tag of nothing"] = refusal(api.create_tag, repo, tag="v2", revision="nothing")
        got["at the tag"] = files("v1")
        refs = api.list_repo_refs(repo)
        got["refs"] = [{ref.name: ref.target_commit for ref in refs.branches} == {"main": copied, "side/one": side},
                       {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}]
        api.delete_tag(repo, tag="v1")
        api.delete_branch(repo, branch="side/one")
        got["deleted main"] = refusal(api.delete_branch, repo, branch="main") is not None
        got["deleted twice"] = refusal(api.delete_branch, repo, branch="side/one") is not None
        refs = api.list_repo_refs(repo)
        got["refs left"] = [[ref.name for ref in refs.branches], [ref.name for ref in refs.tags]]
        answer(got)
        """,
        repo,
        xet=xet,
    )

    assert got["branch twice"] == ["HfHubHTTPError", 409]
    assert got["branch of a ref"] == ["BadRequestError", 400]
    assert got["main before"] == got["main untouched"] == got["at the tag"] == ["a.txt", "deep/b.txt"]
    assert got["stale parent"] == ["HfHubHTTPError", 412]
    assert got["no such branch"] == ["RevisionNotFoundError", 404]
    assert got["half a commit"] is not None
    assert got["main after"] == ["a.txt", "copied/c.txt", "w.safetensors"]
    assert got["copied"] == [True, "c"]
    assert got["tag twice"] == ["HfHubHTTPError", 409]
    assert got["tag of nothing"] == ["RevisionNotFoundError", 404]
    assert got["refs"] == [True, True]
    assert (got["deleted main"], got["deleted twice"]) == (True, True)
    assert got["refs left"] == [["main"], []]


@TRANSPORTS
def test_a_pull_request_gathers_commits_that_main_does_not_see(place: Place, xet: bool) -> None:
    repo = place.new_repo()

    got = place.client(
        """
        repo = sys.argv[1]
        api.create_repo(repo, private=True)
        pull = api.create_pull_request(repo, "Everything at once")
        api.create_commit(repo, [CommitOperationAdd("w.safetensors", b"1" * 2000)], commit_message="first",
                          revision=pull.git_reference)
        api.create_commit(repo, [CommitOperationAdd("c.txt", b"c")], commit_message="second",
                          revision=pull.git_reference)
        other = api.create_commit(repo, [CommitOperationAdd("d.txt", b"d")], commit_message="other", create_pr=True)
        hidden = api.list_repo_files(repo)
        refs = {ref.ref for ref in api.list_repo_refs(repo, include_pull_requests=True).pull_requests}
        gathered = snapshot_download(repo, revision=pull.git_reference)
        api.create_commit(repo, [CommitOperationCopy(name, name, src_revision=pull.git_reference)
                                 for name in ("w.safetensors", "c.txt")], commit_message="all")
        closed = api.change_discussion_status(repo, pull.num, "closed").new_status
        answer([pull.git_reference, other.pr_revision, hidden, sorted(refs), sorted(os.listdir(gathered)),
                sorted(api.list_repo_files(repo)), closed, api.get_discussion_details(repo, pull.num).status])
        """,
        repo,
        xet=xet,
    )

    first, second, hidden, refs, gathered, after, closed, status = got
    assert (first, second, refs) == ("refs/pr/1", "refs/pr/2", ["refs/pr/1", "refs/pr/2"])
    assert hidden == [".gitattributes"]
    assert gathered == after == [".gitattributes", "c.txt", "w.safetensors"]
    assert closed == status == "closed"


def test_metadata_that_the_hub_would_refuse_is_refused_before_and_at_the_commit(place: Place) -> None:
    repo = place.new_repo()

    got = place.client(
        """
        repo = sys.argv[1]
        api.create_repo(repo, private=True)
        def push(metadata):
            card = f"---\\n{metadata}\\n---\\n# Card\\n"
            api.create_commit(repo, [CommitOperationAdd("README.md", card.encode())], commit_message="m")
        answer([refusal(push, "base_model: /models/of/mine"), refusal(push, "license: {name: mit}"),
                refusal(push, "license: ["), refusal(push, "license: mit\\nbase_model: org/base"),
                api.model_info(repo).card_data.base_model])
        """,
        repo,
    )

    assert got == [["ValueError", None], ["ValueError", None], ["ValueError", None], None, "org/base"]


def test_visibility_gating_and_collections_can_be_changed_by_the_owner(place: Place) -> None:
    repo = place.new_repo()

    got = place.client(
        """
        repo, title = sys.argv[1:]
        api.create_repo(repo, private=True)
        before = api.model_info(repo)
        api.update_repo_settings(repo, gated="manual")
        gated = api.model_info(repo)
        api.update_repo_settings(repo, private=False, gated="auto")
        public = api.model_info(repo)
        api.auth_check(repo, write=True)
        owner = api.whoami()["name"]
        made = api.create_collection(title, namespace=owner, private=True)
        same = api.create_collection(title, namespace=owner, exists_ok=True)
        api.add_collection_item(made.slug, repo, "model", note="Noted")
        twice = refusal(api.add_collection_item, made.slug, repo, "model")
        missing = refusal(api.add_collection_item, made.slug, repo + "-not", "model")
        item = api.add_collection_item(made.slug, repo, "model", exists_ok=True).items[0]
        listed = [one.slug for one in api.list_collections(owner=owner, limit=100)]
        api.delete_collection_item(made.slug, item.item_object_id)
        left = len(api.get_collection(made.slug).items)
        api.delete_collection(made.slug)
        api.delete_repo(repo)
        answer([[[i.private, i.gated] for i in (before, gated, public)], made.slug == same.slug, twice, missing,
                [item.item_id, item.note], made.slug in listed, left, api.repo_exists(repo)])
        """,
        repo,
        repo.partition("/")[2],
    )

    settings, same, twice, missing, item, listed, left, exists = got
    assert settings == [[True, False], [True, "manual"], [False, "auto"]]
    assert same
    assert (twice[1], missing[1]) == (409, 404)
    assert item == [repo, "Noted"]
    assert listed
    assert (left, exists) == (0, False)


# --- who may do what


def test_each_token_sees_and_does_what_the_hub_would_let_it(hub: HubServer, tmp_path: Path) -> None:
    for repo in ("alice/open", "org/closed", "alice/gated"):
        files = {"a.txt": b"a", "w.safetensors": b"w"}
        hub.add_repo(repo, files, private=repo.endswith("closed"), gated=repo.endswith("gated"))
    script = """
repos = ("alice/open", "org/closed", "alice/gated")
def commit(repo, **more): api.create_commit(repo, [CommitOperationAdd("b.txt", b"b")], commit_message="m", **more)
def describe(repo): api.model_info(repo), api.list_repo_files(repo)
def read(repo): hf_hub_download(repo, "w.safetensors")
def write(repo): commit(repo)
def propose(repo): commit(repo, create_pr=True)
got = {call.__name__: [refusal(call, repo) for repo in repos] for call in (describe, read, write, propose)}
got["create"] = [refusal(api.create_repo, f"{owner}/new-{os.getpid()}") for owner in ("alice", "org", "bob")]
got["whoami"] = refusal(api.whoami)
answer(got)
"""

    def tried(token: str | None) -> dict[str, list[Any]]:
        got: dict[str, list[Any]] = run_client(hub.environment(tmp_path / f"home-{token}", token, xet=False), script)
        return got

    anonymous, bob, reader, alice, wrong = (
        tried(token) for token in (None, "hf_bob_write", "hf_alice_read", "hf_alice_write", "hf_wrong")
    )

    hidden, restricted, forbidden = "RepositoryNotFoundError", "GatedRepoError", ["HfHubHTTPError", 403]
    assert anonymous["describe"] == [None, [hidden, 401], None]
    assert anonymous["read"] == [None, [hidden, 401], [restricted, 401]]
    assert {status for _, status in anonymous["write"]} == {401}
    assert bob["describe"] == [None, [hidden, 404], None]
    assert bob["read"] == [None, [hidden, 404], [restricted, 403]]
    assert bob["write"] == [forbidden, [hidden, 404], forbidden]
    assert bob["propose"] == [None, [hidden, 404], None]
    assert bob["create"] == [forbidden, forbidden, None]
    assert reader["describe"] == reader["read"] == [None, None, None]
    assert reader["write"] == reader["propose"] == reader["create"] == [forbidden] * 3
    assert alice["describe"] == alice["read"] == alice["write"] == alice["propose"] == [None, None, None]
    assert alice["create"] == [None, None, forbidden]
    assert {tuple(one) for one in (*wrong["describe"], *wrong["write"], wrong["whoami"])} == {("HfHubHTTPError", 401)}
    assert not any(request.token_present for request in hub.requests if request.role == "cdn")


def test_whom_the_owner_lets_in_reads_a_gated_repository(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("alice/gated", {"a.txt": b"a"}, gated="manual")
    url = f"{hub.url}/alice/gated/resolve/main/a.txt"
    bob = {"Authorization": "Bearer hf_bob_write"}

    before = fetch(url, headers=bob)[0]
    run_client(hub.environment(tmp_path / "home"), "api.grant_access('alice/gated', 'bob'); answer(None)")

    assert (before, fetch(url, headers=bob)[0], fetch(url)[0]) == (403, 200, 401)


# --- contents


def test_an_lfs_file_goes_up_in_parts_and_is_put_together(hub: HubServer, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3_500_000)
    (tmp_path / "w.safetensors").write_bytes(data)

    run_client(
        hub.environment(tmp_path / "home", xet=False),
        "api.create_repo('alice/parts')\n"
        "api.upload_file(repo_id='alice/parts', path_or_fileobj=sys.argv[1], path_in_repo='w.safetensors')\nanswer(0)",
        tmp_path / "w.safetensors",
    )

    assert [request.received for request in hub.matching("PUT /part/")] == [1 << 20, 1 << 20, 1 << 20, 354_272]
    assert hub.count("PUT /put/") == 0
    assert hub.content_received == len(data)
    assert hub.repo("alice/parts").files()["w.safetensors"] == data
    assert not list((tmp_path / "hub" / "incoming").iterdir())


def _upload_url(hub: HubServer, data: bytes) -> str:
    wanted = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    body = json.dumps({"operation": "upload", "transfers": ["basic"], "objects": [wanted]}).encode()
    _, _, answer = fetch(f"{hub.url}/alice/repo.git/info/lfs/objects/batch", method="POST", body=body, headers=ALICE)
    return str(json.loads(answer)["objects"][0]["actions"]["upload"]["href"])


def test_a_content_that_does_not_match_its_hash_is_never_stored(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("alice/repo", {"a.txt": b"a"})
    wanted = b"what was announced"
    sha256 = hashlib.sha256(wanted).hexdigest()
    url = _upload_url(hub, wanted)
    pointer = {"path": "w.safetensors", "algo": "sha256", "oid": sha256, "size": len(wanted)}
    lines = ({"key": "header", "value": {"summary": "m"}}, {"key": "lfsFile", "value": pointer})
    body = "\n".join(json.dumps(line) for line in lines).encode()
    commit = f"{hub.url}/api/models/alice/repo/commit/main"

    wrong = fetch(url, method="PUT", body=b"what is sent")
    forged = fetch(url.replace(url[-8:], "00000000"), method="PUT", body=wanted)
    early = fetch(commit, method="POST", body=body, headers=ALICE)
    stored = hub.lfs_size(sha256)
    right = fetch(url, method="PUT", body=wanted)
    late = fetch(commit, method="POST", body=body, headers=ALICE)

    assert [wrong[0], forged[0], early[0], right[0], late[0]] == [400, 403, 400, 200, 200]
    assert b"BadDigest" in wrong[2]
    assert stored is None
    assert hub.repo("alice/repo").files()["w.safetensors"] == wanted


def test_a_signed_url_expires(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub", url_seconds=0.3) as hub:
        hub.add_repo("alice/repo", {"w.safetensors": b"weights"})
        location = fetch(f"{hub.url}/alice/repo/resolve/main/w.safetensors")[1]["Location"]

        fresh = fetch(location)[0]
        time.sleep(0.4)

        assert (fresh, fetch(location)[0]) == (200, 403)


def test_an_lfs_file_is_sent_in_ranges_from_another_origin(hub: HubServer) -> None:
    data = bytes(range(256)) * 10
    commit = hub.add_repo("alice/repo", {"w.safetensors": data, "a.txt": b"0123456789"})

    status, headers, _ = fetch(f"{hub.url}/alice/repo/resolve/main/w.safetensors", method="HEAD")
    location = headers["Location"]
    ranges = {
        wanted: fetch(location, headers={"Range": wanted})
        for wanted in ("bytes=5-9", "bytes=2550-", "bytes=-3", "bytes=2560-")
    }

    assert status == 302
    assert urlsplit(location).netloc != urlsplit(hub.url).netloc
    assert headers["X-Repo-Commit"] == commit
    assert headers["X-Linked-Etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert headers["X-Linked-Size"] == str(len(data))
    assert ranges["bytes=5-9"][0::2] == (206, data[5:10])
    assert ranges["bytes=5-9"][1]["Content-Range"] == "bytes 5-9/2560"
    assert ranges["bytes=2550-"][2] == data[2550:]
    assert ranges["bytes=-3"][2] == data[-3:]
    assert ranges["bytes=2560-"][0] == 416
    assert fetch(f"{hub.url}/alice/repo/resolve/main/a.txt", headers={"Range": "bytes=3-4"})[0::2] == (206, b"34")


def test_a_stored_file_can_be_altered_behind_everyones_back(hub: HubServer) -> None:
    hub.add_repo("alice/repo", {"a.txt": b"sound", "w.safetensors": b"sound"})
    before = hub.repo("alice/repo").tree()

    for path in before:
        hub.stored("alice/repo", path).write_bytes(b"wrong")

    location = fetch(f"{hub.url}/alice/repo/resolve/main/w.safetensors")[1]["Location"]
    assert fetch(location)[2] == fetch(f"{hub.url}/alice/repo/resolve/main/a.txt")[2] == b"wrong"
    assert hub.repo("alice/repo").tree() == before


def test_datasets_are_kept_apart_from_models(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("alice/same", {"a.txt": b"model"})
    hub.add_repo("alice/same", {"a.txt": b"dataset", "w.parquet": b"rows"}, kind="datasets")

    got = run_client(
        hub.environment(tmp_path / "home"),
        """
        read = lambda path, **kind: Path(hf_hub_download("alice/same", path, **kind)).read_text()
        answer([read("a.txt"), read("a.txt", repo_type="dataset"), read("w.parquet", repo_type="dataset"),
                refusal(read, "w.parquet")])
        """,
    )

    assert got == ["model", "dataset", "rows", ["RemoteEntryNotFoundError", 404]]


def test_xet_uploads_what_is_known_nowhere_and_nothing_else(hub: HubServer, tmp_path: Path) -> None:
    files = {name: data for name, data in contents().items() if name.endswith(".safetensors")}
    source = save(tmp_path / "source", files)
    script = "api.create_repo(sys.argv[1])\napi.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])\nanswer(0)"

    run_client(hub.environment(tmp_path / "one"), script, "alice/one", source)
    received = hub.content_received
    run_client(hub.environment(tmp_path / "two"), script, "alice/two", source)

    assert 1_500_001 < received < sum(map(len, files.values()))
    assert hub.content_received == received
    xorbs = [path.read_bytes() for path in (tmp_path / "hub/cas/xorbs").iterdir()]
    schemes = {xorb[offset + 4] for xorb in xorbs for offset in chunk_offsets(xorb)[:-1]}
    assert schemes == {0, 1, 2}, "stored as they are, compressed, compressed with bytes grouped: all are read below"
    for repo in ("alice/one", "alice/two"):
        found = hub.repo(repo).files()
        assert {name: found[name] for name in files} == files
    assert hub.count("PUT /") == 0


def test_xet_takes_nothing_without_a_token_to_write_and_no_shard_without_its_xorbs(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.add_repo("alice/repo", {"a.txt": b"a"}, private=True)
    script = "api.create_repo('alice/xet')\napi.upload_folder(repo_id='alice/xet', folder_path=sys.argv[1])\nanswer(0)"
    run_client(hub.environment(tmp_path / "home"), script, save(tmp_path / "source", contents()))
    shard = next((tmp_path / "hub/cas/shards").iterdir()).read_bytes()
    xorb = next((tmp_path / "hub/cas/xorbs").iterdir())
    xorb.unlink()

    def token(kind: str, who: str) -> tuple[int, dict[str, str]]:
        url = f"{hub.url}/api/models/alice/repo/xet-{kind}-token/main"
        status, _, body = fetch(url, headers={"Authorization": f"Bearer {who}"})
        return status, {"Authorization": f"Bearer {json.loads(body).get('accessToken')}"}

    def send(headers: Mapping[str, str] | None) -> int:
        return fetch(f"{hub.cas_url}/v1/shards", method="POST", body=shard, headers=headers)[0]

    refused = [token("read", "hf_bob_write")[0], token("write", "hf_bob_write")[0], token("write", "hf_alice_read")[0]]
    read_only, writing = token("read", "hf_alice_read")[1], token("write", "hf_alice_write")[1]
    forged = {"Authorization": writing["Authorization"][:-4] + "0000"}

    assert refused == [404, 404, 403]
    assert [send(None), send(forged), send(read_only), send(writing)] == [401, 401, 403, 400]


def test_lz4_frames_are_read_as_their_format_has_them() -> None:
    plain = b"\x04\x22\x4d\x18\x60\x40\x82" + struct.pack("<I", 1 << 31 | 5) + b"plain" + bytes(4)
    # Literals "ab", then 9 bytes copied from 2 back; then literals of a length that needs a second byte.
    tail = bytes(range(20))
    block = b"\x25ab\x02\x00" + b"\xf0\x05" + tail
    packed = b"\x04\x22\x4d\x18\x60\x40\x82" + struct.pack("<I", len(block)) + block + bytes(4)

    assert decompress_lz4(plain) == b"plain"
    assert decompress_lz4(packed) == b"ababababab" + b"a" + tail


def test_a_tree_is_listed_page_by_page(tmp_path: Path) -> None:
    files = {f"folder/{number:03}.txt": str(number).encode() for number in range(25)}
    with HubServer(tmp_path / "hub", page_size=7) as hub:
        hub.add_repo("alice/repo", files)

        names = run_client(
            hub.environment(tmp_path / "home"),
            "folder = Path(snapshot_download('alice/repo'), 'folder')\n"
            "answer([sorted(api.list_repo_files('alice/repo')), len(os.listdir(folder))])",
        )

        assert names == [sorted(files), 25]
        assert hub.count("GET .*/tree/.*cursor=7&?") >= 1


def test_a_server_started_again_on_its_folder_goes_on(tmp_path: Path) -> None:
    files = contents()
    source = save(tmp_path / "source", files)
    with HubServer(tmp_path / "hub") as hub:
        script = (
            "api.create_repo('org/kept', private=True)\n"
            "oid = api.upload_folder(repo_id='org/kept', folder_path=sys.argv[1]).oid\n"
            "api.create_tag('org/kept', tag='v1')\napi.update_repo_settings('org/kept', gated='auto')\n"
            "api.create_branch('org/kept', branch='side')\napi.create_pull_request('org/kept', 'Wait')\n"
            "slug = api.create_collection('Kept', namespace='org').slug\n"
            "api.add_collection_item(slug, 'org/kept', 'model')\nanswer([oid, slug])"
        )
        oid, slug = run_client(hub.environment(tmp_path / "home"), script, source)
        before = hub.repo("org/kept")

    with HubServer(tmp_path / "hub") as hub:
        after = hub.repo("org/kept")
        script = (
            "folder = snapshot_download('org/kept', revision='v1')\n"
            "answer([sorted(os.listdir(folder)), len(api.get_collection(sys.argv[1]).items)])"
        )
        names, items = run_client(hub.environment(tmp_path / "other"), script, slug)

        assert (after.refs, after.tags, after.private, after.gated) == (before.refs, before.tags, True, "auto")
        assert set(after.refs) == {"main", "side", "refs/pr/1"}
        assert after.tags == {"v1": oid}
        assert after.commits == before.commits
        assert after.pulls == before.pulls
        assert {path: data for path, data in after.files().items() if path != ".gitattributes"} == files
        assert "noise.safetensors" in names
        assert items == 1


# --- faults


@pytest.fixture
def served(hub: HubServer) -> HubServer:
    hub.add_repo("alice/repo", {"a.txt": b"0123456789", "w.safetensors": bytes(100_000)})
    return hub


def test_a_dropped_or_reset_connection_answers_nothing_and_does_nothing(served: HubServer) -> None:
    served.fault("GET .*/a.txt", drop_after=0)
    served.fault("GET .*/a.txt", reset=True)
    served.fault("POST .*/tag/", drop_after=0)
    tag = f"{served.url}/api/models/alice/repo/tag/main"

    with pytest.raises(http.client.RemoteDisconnected):
        fetch(f"{served.url}/alice/repo/resolve/main/a.txt")
    with pytest.raises(ConnectionResetError):
        fetch(f"{served.url}/alice/repo/resolve/main/a.txt")
    with pytest.raises(http.client.RemoteDisconnected):
        fetch(tag, method="POST", body=b'{"tag": "v1"}', headers=ALICE)

    assert served.repo("alice/repo").tags == {}
    assert [request.status for request in served.requests] == [None, None, None]
    assert fetch(f"{served.url}/alice/repo/resolve/main/a.txt")[2] == b"0123456789"


def test_a_lost_response_leaves_what_was_asked_done(served: HubServer) -> None:
    served.fault("POST .*/tag/", lost_response=True)
    tag = f"{served.url}/api/models/alice/repo/tag/main"

    with pytest.raises(http.client.RemoteDisconnected):
        fetch(tag, method="POST", body=b'{"tag": "v1"}', headers=ALICE)

    assert set(served.repo("alice/repo").tags) == {"v1"}
    assert fetch(tag, method="POST", body=b'{"tag": "v1"}', headers=ALICE)[0] == 409


def test_downloads_break_off_or_arrive_altered_as_ordered(served: HubServer) -> None:
    url = f"{served.url}/alice/repo/resolve/main/a.txt"
    served.fault("a.txt", drop_after=4)
    corrupt = served.fault("a.txt", corrupt_at=7, times=2)

    with pytest.raises(http.client.IncompleteRead) as cut:
        fetch(url)
    altered, ranged, sound = fetch(url)[2], fetch(url, headers={"Range": "bytes=6-8"})[2], fetch(url)[2]

    assert cut.value.partial == b"0123"
    assert altered == b"0123456" + bytes([ord("7") ^ 0xFF]) + b"89"
    assert ranged == altered[6:9]
    assert sound == b"0123456789"
    assert (corrupt.hits, corrupt.times) == (2, 0)


def test_an_upload_that_breaks_off_leaves_nothing(served: HubServer, tmp_path: Path) -> None:
    data = bytes(200_000)
    url = _upload_url(served, data)
    served.fault("PUT /put/", drop_after=100_000)

    with pytest.raises((ConnectionError, http.client.HTTPException)):
        fetch(url, method="PUT", body=data)

    assert served.matching("PUT /put/")[0].received == 100_000
    assert served.lfs_size(hashlib.sha256(data).hexdigest()) is None
    assert not list((tmp_path / "hub" / "incoming").iterdir())


def test_faults_hit_the_request_they_were_ordered_for(served: HubServer) -> None:
    url = f"{served.url}/alice/repo/resolve/main/a.txt"
    served.fault("a.txt", skip=1, status=503, headers={"Retry-After": "7"})
    late = served.fault_at(4, status=500)

    answers = [fetch(url) for _ in range(3)]
    served.faults.clear()
    third = served.fault_at(2, status=500)
    counted = [fetch(f"{served.url}/api/{name}")[0] for name in ("one", "two", "three", "four")]

    assert [status for status, _, _ in answers] == [200, 503, 200]
    assert answers[1][1]["Retry-After"] == "7"
    assert (late.hits, third.hits) == (0, 1)
    assert counted == [404, 404, 500, 404]
    assert served.count("a.txt") == 3


def test_a_delay_delays_and_a_stopping_server_does_not_wait_for_it(served: HubServer) -> None:
    served.fault("a.txt", delay=0.3)
    started = time.monotonic()

    fetch(f"{served.url}/alice/repo/resolve/main/a.txt")

    assert time.monotonic() - started >= 0.3
    served.fault("a.txt", delay=600)
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=20)
    connection.request("GET", "/alice/repo/resolve/main/a.txt")
    while served.count("a.txt") < 2:
        time.sleep(0.01)
    started = time.monotonic()
    served.stop()
    connection.close()
    assert time.monotonic() - started < 10


def test_too_many_requests_are_told_when_to_come_again(served: HubServer) -> None:
    served.rate_limit = (2, 60.0)
    url = f"{served.url}/api/models/alice/repo"

    answers = [fetch(url) for _ in range(3)]

    assert [status for status, _, _ in answers] == [200, 200, 429]
    assert 0 < int(answers[2][1]["Retry-After"]) <= 61
    assert answers[2][1]["RateLimit"].startswith('"api";r=0;t=')


@TRANSPORTS
def test_the_client_meets_each_fault_as_it_would_meet_it_on_the_hub(hub: HubServer, tmp_path: Path, xet: bool) -> None:
    data = random.Random(2).randbytes(2_000_000)
    held = 10 << 20  # the client writes pieces of this size
    down = {name: name.encode() + data for name in ("corrupt", "reset", "busy")} | {"drop": bytes(held) + data}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in down.items()}
    hub.add_repo("alice/down", {f"{name}.safetensors": content for name, content in down.items()})
    hub.fault(f"GET /get/{digests['drop']}", drop_after=held + 1_000_000)
    hub.fault(f"GET /get/{digests['corrupt']}", corrupt_at=1234)
    hub.fault(f"GET /get/{digests['reset']}", drop_after=1_000_000, reset=True)
    hub.fault("HEAD .*/busy.safetensors", status=503)
    hub.fault("PUT /(put|part)/|POST /v1/xorbs/", drop_after=500_000)
    hub.fault("POST .*/preupload/", status=429, headers={"Retry-After": "0"})
    hub.fault("POST .*/commit/", lost_response=True)

    got = run_client(
        hub.environment(tmp_path / "home", xet=xet),
        """
import hashlib
def sha256(name):
    return hashlib.sha256(Path(hf_hub_download("alice/down", f"{name}.safetensors")).read_bytes()).hexdigest()
got = {name: sha256(name) for name in ("drop", "corrupt", "busy")}
got["reset"] = refusal(sha256, "reset")
api.create_repo("alice/up")
commit = lambda: api.create_commit("alice/up", [CommitOperationAdd("w.safetensors", sys.argv[1])], commit_message="m")
got["commit"] = refusal(commit)
got["titles"] = [commit.title for commit in api.list_repo_commits("alice/up")]
answer(got)
""",
        save(tmp_path / "source", {"w.safetensors": data}) / "w.safetensors",
    )

    resumed = [request for request in hub.matching(digests["drop"]) if request.range]
    assert got["drop"] == digests["drop"]
    assert [request.range for request in resumed] == [f"bytes={held}-"], "it goes on after what it wrote"
    assert got["corrupt"] != digests["corrupt"], "the client does not look"
    assert got["busy"] == digests["busy"]
    assert got["reset"] is not None
    assert got["commit"] is not None, "it learns nothing of the commit"
    assert got["titles"] == ["m", "initial commit"], "which was made all the same"
    assert hub.repo("alice/up").files()["w.safetensors"] == data


# --- for a person


@TRANSPORTS
def test_the_hf_command_uploads_downloads_and_verifies(hub: HubServer, tmp_path: Path, xet: bool) -> None:
    files = contents()
    source = save(tmp_path / "source", files)
    environment = hub.environment(tmp_path / "home", xet=xet)

    def hf(*arguments: str | Path) -> str:
        command = [str(Path(sys.executable).with_name("hf")), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout

    hf("repos", "create", "alice/cli")
    hf("upload", "alice/cli", source, ".")
    hf("download", "alice/cli", "--local-dir", tmp_path / "down")
    hf("download", "alice/cli")
    hf("cache", "verify", "alice/cli")

    found = read(tmp_path / "down")
    assert {path: found[path] for path in files} == files


def test_it_runs_by_itself_until_it_is_interrupted(tmp_path: Path) -> None:
    environment = dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "hub_server", str(tmp_path / "hub"), "--multipart", "1000000"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        endpoint = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
        assert endpoint is not None

        whoami = fetch(f"{endpoint[0]}/api/whoami-v2", headers=ALICE)
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=20)

    assert (whoami[0], json.loads(whoami[2])["name"], server.returncode) == (200, "alice", 0)
