"""Opening a release by its Hub id, against a real server: pinned, verified, once, offline, with and without access."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import projections, random_factors, save_adapter, save_base, save_tokenizer, tiny_config
from hub_client import loram, python, run
from hub_server import HubServer

from loram_hub.pruning import prune
from loram_hub.release import open_metadata

FETCH = """
from loram_hub.hub import fetch_release
source, release = fetch_release(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None)
ratio = release.manifest.pruning.pruning_ratio
print(json.dumps({"folder": str(source.folder), "commit": source.commit, "ratio": ratio}))
"""
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fetching") / "base"
    return save_tokenizer(save_base(folder, tiny_config(layers=3), dtype="bfloat16"))


@pytest.fixture(scope="module")
def releases(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("releases")
    made = [
        prune(base, folder / f"{ratio}", importance="random", pruning_ratio=ratio, keep_first=1, keep_last=1).folder
        for ratio in (0.4, 0.2)
    ]
    return made[0], made[1]


@pytest.fixture
def hub(tmp_path: Path, releases: tuple[Path, Path]) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        server.add_repo("org/release", releases[0])
        yield server


def upload(hub: HubServer, home: Path, repo: str, folder: Path, *, xet: bool) -> None:
    python(
        hub,
        home,
        "from huggingface_hub import HfApi\nHfApi().create_repo(sys.argv[1])\n"
        "HfApi().upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])\nprint(0)",
        repo,
        folder,
        xet=xet,
    )


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_release_opens_by_its_id_and_computes_what_the_folder_computes(
    hub: HubServer, releases: tuple[Path, Path], tmp_path: Path, xet: bool
) -> None:
    upload(hub, tmp_path / "publisher", "alice/release", releases[0], xet=xet)
    sums = python(
        hub,
        tmp_path / "home",
        """
import torch
from loram_hub import AutoLoramModel
ids = torch.arange(4, 20)[None]
models = [AutoLoramModel.from_pretrained(name, dtype="float32") for name in sys.argv[1:]]
assert models[0].name_or_path == sys.argv[1], models[0].name_or_path
assert models[0].loram.manifest == models[1].loram.manifest
print(json.dumps([float(model(ids).logits.double().square().sum()) for model in models]))
""",
        "alice/release",
        releases[0],
        xet=xet,
    )

    assert sums[0] == sums[1] > 0


def test_branch_tag_and_commit_are_pinned_to_one_commit(
    hub: HubServer, releases: tuple[Path, Path], tmp_path: Path
) -> None:
    first = hub.repo("org/release").refs["main"]
    hub.repo("org/release").tags["v1"] = first
    second = hub.add_repo("org/release", releases[1])

    found = {name: python(hub, tmp_path / "home", FETCH, "org/release", name) for name in ("v1", "main", first)}
    assert {name: (one["commit"], one["ratio"]) for name, one in found.items()} == {
        "v1": (first, 0.4),
        "main": (second, 0.2),
        first: (first, 0.4),
    }


def test_a_release_that_is_replaced_during_the_download_arrives_as_one(
    hub: HubServer, releases: tuple[Path, Path], tmp_path: Path
) -> None:
    """Every file comes from the commit that was current when the download began."""
    hub.fault("GET /api/models/org/release/tree", delay=1.5)
    first = hub.repo("org/release").refs["main"]

    def replace() -> None:
        while not hub.count("GET /api/models/org/release/tree"):
            time.sleep(0.02)
        hub.add_repo("org/release", releases[1])

    writer = threading.Thread(target=replace)
    writer.start()
    found = python(hub, tmp_path / "home", FETCH, "org/release")
    writer.join()

    assert (found["commit"], found["ratio"]) == (first, 0.4)
    assert hub.repo("org/release").refs["main"] != first


def test_a_verified_snapshot_is_not_read_again_and_a_changed_one_is(hub: HubServer, tmp_path: Path) -> None:
    read = """
import time
from pathlib import Path
from loram_hub.hub import fetch_release

def bytes_read(**options):
    count = lambda: int(Path("/proc/self/io").read_text().split()[1])
    before = count()
    source, _ = fetch_release("org/release", **options)
    return count() - before, source.folder

first, folder = bytes_read()
time.sleep(0.2)
bytes_read()
again, _ = bytes_read(local_files_only=True)
weights = folder / "model.safetensors"
size = weights.stat().st_size
data = bytearray(weights.read_bytes())
data[-1] ^= 1
weights.resolve().write_bytes(data)
try:
    fetch_release("org/release", local_files_only=True)
    altered = "opened"
except Exception as err:
    altered = type(err).__name__
healed, _ = bytes_read()
print(json.dumps({"again": again, "size": size, "altered": altered, "healed": healed}))
"""
    found = python(hub, tmp_path / "home", read, HF_HUB_DISABLE_PROGRESS_BARS="1")

    assert found["again"] < found["size"] / 2  # manifest, index and headers, not the weights
    assert found["altered"] == "VerificationError"
    assert found["healed"] > found["size"]
    assert hub.count("GET /get/") >= 2  # fetched once more


def test_without_network_what_is_in_the_cache_opens(hub: HubServer, tmp_path: Path) -> None:
    first = python(hub, tmp_path / "home", FETCH, "org/release")
    hub.requests.clear()
    again = python(hub, tmp_path / "home", FETCH, "org/release", HF_HUB_OFFLINE="1")

    assert again == first
    assert hub.requests == []
    empty = loram(hub, tmp_path / "empty", "verify", "org/release", HF_HUB_OFFLINE="1")
    assert empty.returncode == 5
    assert "offline" in empty.stderr


def test_a_damaged_cache_is_exit_code_3_offline_and_mended_online(hub: HubServer, tmp_path: Path) -> None:
    folder = Path(python(hub, tmp_path / "home", FETCH, "org/release")["folder"])
    for name in ("loram.json", "config.json", "mask_index.safetensors", WEIGHTS, "tokenizer.json"):
        blob = (folder / name).resolve()
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 4
        blob.write_bytes(data)

        offline = loram(hub, tmp_path / "home", "verify", "org/release", HF_HUB_OFFLINE="1")
        assert offline.returncode in (3, 4), offline.stderr
        assert "Traceback" not in offline.stderr
        online = loram(hub, tmp_path / "home", "verify", "org/release")
        assert online.returncode == 0, online.stderr


@pytest.mark.parametrize("token", ["hf_bob_write", None, "hf_nobody_knows_this_one"])
def test_private_and_gated_releases_open_only_for_those_who_may(
    hub: HubServer, tmp_path: Path, token: str | None
) -> None:
    repository = hub.repo("org/release")
    for private, gated in ((True, False), (False, "manual")):
        repository.private, repository.gated = private, gated
        refused = loram(hub, tmp_path / "stranger", "verify", "org/release", token=token)
        assert refused.returncode == 5, refused.stderr
        assert "org/release" in refused.stderr
        assert "hf auth login" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert token is None or token not in refused.stdout + refused.stderr
    repository.private, repository.gated = True, "manual"
    allowed = loram(hub, tmp_path / "member", "verify", "org/release")
    assert allowed.returncode == 0, allowed.stderr
    by_option = loram(hub, tmp_path / "option", "verify", "org/release", "--token", "hf_alice_read", token=None)
    assert by_option.returncode == 0, by_option.stderr


def test_a_slow_connection_and_one_that_drops_end_whole(hub: HubServer, tmp_path: Path) -> None:
    hub.fault("GET /get/", delay=2.5)
    hub.fault("GET /get/", skip=1, drop_after=100, times=2)
    hub.fault("GET .*/revision/main", status=503, times=2)
    found = python(hub, tmp_path / "home", FETCH, "org/release", HF_HUB_DOWNLOAD_TIMEOUT="1")

    assert found["ratio"] == 0.4
    assert hub.count("GET /get/") >= 4


def test_what_the_publisher_altered_is_refused_and_not_fetched_for_ever(
    hub: HubServer, releases: tuple[Path, Path], tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in releases[0].iterdir()}
    data = bytearray(files[WEIGHTS])
    data[-1] ^= 1
    hub.add_repo("org/release", files | {WEIGHTS: bytes(data)})
    refused = loram(hub, tmp_path / "home", "verify", "org/release")

    assert refused.returncode == 3, refused.stderr
    assert WEIGHTS in refused.stderr
    assert hub.count("GET /get/") <= 4  # two files, at most twice each


def test_code_and_pickles_in_the_repository_are_not_even_fetched(
    hub: HubServer, releases: tuple[Path, Path], tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in releases[0].iterdir()}
    hub.add_repo("org/release", files | {"modeling.py": b"1/0", "pytorch_model.bin": b"x"})
    opened = run(
        hub, tmp_path / "home", "-c", "from loram_hub import AutoLoramModel as A; A.from_pretrained('org/release')",
        token=None, xet=False,
    )  # fmt: skip

    assert opened.returncode == 0, opened.stderr
    assert hub.count("GET .*(modeling.py|pytorch_model.bin)") == 0


def test_recover_fetches_manifest_index_and_config_and_nothing_else(
    hub: HubServer, releases: tuple[Path, Path], tmp_path: Path
) -> None:
    tensors = random_factors(projections(open_metadata(releases[0]).plan))
    save_adapter(tmp_path / "pruned", tensors, base="org/release")
    done = loram(hub, tmp_path / "home", "recover", tmp_path / "pruned", tmp_path / "recovered", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["base_id"] == "base"
    record = json.loads((tmp_path / "recovered" / "loram.json").read_text())
    assert record["release"] == {
        "id": "org/release",
        "commit": hub.repo("org/release").refs["main"],
        "plan_sha256": open_metadata(releases[0]).plan.digest,
    }
    asked = {request.path.rpartition("/")[2].partition("?")[0] for request in hub.matching("(GET|HEAD) /.*/resolve/")}
    assert asked == {"loram.json", "mask_index.safetensors", "config.json"}
    sent: dict[str, Any] = {}
    for request in hub.matching("GET (/.*/resolve/|/get/)"):
        sent[request.path] = request.sent
    sizes = [(releases[0] / name).stat().st_size for name in asked]
    assert sum(sent.values()) < sum(sizes) + 5_000


def test_a_base_model_that_arrives_damaged_is_fetched_again_before_it_is_pruned(
    hub: HubServer, base: Path, tmp_path: Path
) -> None:
    hub.add_repo("org/base", base)
    size = (base / WEIGHTS).stat().st_size
    hub.fault("GET /get/", corrupt_at=size - 7)
    structure = ("--importance", "random", "--keep-first", "1", "--keep-last", "1", "--pruning-ratio", "0.4")
    done = loram(hub, tmp_path / "home", "prune", "org/base", tmp_path / "out", *structure)

    assert done.returncode == 0, done.stderr
    local = tmp_path / "base"
    shutil.copytree(base, local)
    expected = prune(local, tmp_path / "expected", importance="random", pruning_ratio=0.4, keep_first=1, keep_last=1)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (expected.folder / WEIGHTS).read_bytes()


def test_a_token_that_is_not_there_is_not_waited_for() -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    from loram_hub.hub.access import persistently

    calls = []

    def ask() -> None:
        calls.append(1)
        raise LocalTokenNotFoundError("no token")

    with pytest.raises(LocalTokenNotFoundError):
        persistently(ask)
    assert len(calls) == 1
