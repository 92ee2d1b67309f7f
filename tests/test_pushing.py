"""Publishing on the Hub, against a real server: whole, verified, once, and within the licence."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import projections, random_factors, save_adapter, save_base, save_tokenizer, tiny_config
from hub_client import loram, python
from hub_server import HubServer
from safetensors.numpy import load_file

from loram_hub.pruning import prune
from loram_hub.recovery import recover

PUBLISHED = {
    "LICENSE", "README.md", "config.json", "generation_config.json", "loram.json", "mask_index.safetensors",
    "model.safetensors", "pictures/kept_groups.png", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
LICENCE = "Apache License\nVersion 2.0, January 2004\nhttp://www.apache.org/licenses/\n"
CHANGES = r"^(POST|PUT|DELETE) /(?!api/(validate-yaml|models/[^/]+/[^/]+/(preupload|paths-info)))"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("pushing") / "base", tiny_config(layers=3), dtype="bfloat16")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base model\n")
    (folder / "LICENSE").write_text(LICENCE)
    return save_tokenizer(folder)


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A server's folder that holds the base, and the commit."""
    folder = tmp_path_factory.mktemp("served")
    with HubServer(folder) as server:
        return folder, server.add_repo("org/base", base)


@pytest.fixture(scope="module")
def snapshot(base: Path, served: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as it lies in a Hub cache, so that releases name it by id and commit."""
    folder = tmp_path_factory.mktemp("cache") / "models--org--base" / "snapshots" / served[1]
    shutil.copytree(base, folder)
    return folder


@pytest.fixture(scope="module")
def release(snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("release") / "release"
    return prune(snapshot, out, importance="random", pruning_ratio=0.4, keep_first=1, keep_last=1).folder


@pytest.fixture
def hub(tmp_path: Path, served: tuple[Path, str]) -> Iterator[HubServer]:
    shutil.copytree(served[0], tmp_path / "hub")
    with HubServer(tmp_path / "hub") as server:
        yield server


def push(hub: HubServer, home: Path, *arguments: str | Path, code: int = 0, **options: Any) -> dict[str, Any]:
    done = loram(hub, home, "push", *arguments, "--json", **options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_what_is_on_the_hub_is_the_release_and_its_card(
    hub: HubServer, release: Path, tmp_path: Path, xet: bool
) -> None:
    pushed = push(hub, tmp_path / "home", release, "alice/tiny", "--tag", "v1", "--collection", "Tiny ones", xet=xet)

    repository = hub.repo("alice/tiny")
    files = repository.files()
    assert set(files) == PUBLISHED | {".gitattributes"}
    for path in release.iterdir():
        assert files[path.name] == path.read_bytes()
    assert b"library_name: loram-hub" in files["README.md"]
    assert repository.tags == {"v1": pushed["commit"]}
    assert repository.history("main")[0].oid == pushed["commit"]
    assert len(repository.history("main")) == 2
    assert set(repository.refs) == {"main"}
    assert (repository.private, repository.gated) == (False, False)
    (collection,) = hub.collections.values()
    assert collection.title == "Tiny ones"
    assert not (release / "README.md").exists()


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_pushing_again_sends_and_changes_nothing(hub: HubServer, release: Path, tmp_path: Path, xet: bool) -> None:
    first = push(hub, tmp_path / "home", release, "alice/tiny", xet=xet)
    hub.requests.clear()
    again = push(hub, tmp_path / "other-home", release, "alice/tiny", xet=xet)

    assert again["commit"] == first["commit"]
    assert again["new_bytes"] == 0
    assert hub.content_received == 0
    assert [request.line for request in hub.matching(CHANGES) if "repos/create" not in request.line] == []


def test_a_dry_run_says_everything_and_changes_nothing(hub: HubServer, release: Path, tmp_path: Path) -> None:
    found = push(hub, tmp_path / "home", release, "alice/tiny", "--dry-run", "--tag", "v1")

    assert {file["name"] for file in found["files"]} == PUBLISHED
    assert found["nbytes"] == found["new_bytes"] == sum(file["size"] for file in found["files"])
    assert (found["commit"], found["private"], found["gated"], found["licence"]) == (None, False, False, "apache-2.0")
    assert found["duties"]
    assert all(duty["met"] for duty in found["duties"])
    assert hub.matching(CHANGES) == []
    assert ("models", "alice/tiny") not in hub.repos
    text = loram(hub, tmp_path / "home", "push", release, "alice/tiny", "--dry-run")
    assert "Would push" in text.stdout
    assert "model.safetensors" in text.stdout


def test_a_dry_run_needs_no_network(release: Path, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        options = ("--dry-run", "--license", "apache-2.0")
        found = push(hub, tmp_path / "home", release, "alice/tiny", *options, HF_HUB_OFFLINE="1")

    assert found["private"] is True
    assert "was not asked" in found["notes"][0]


def test_a_release_of_a_gated_base_is_gated_and_private(hub: HubServer, release: Path, tmp_path: Path) -> None:
    hub.repo("org/base").gated = "manual"
    hub.repo("org/base").allowed.add("alice")
    first = push(hub, tmp_path / "home", release, "alice/tiny")

    assert (hub.repo("alice/tiny").private, hub.repo("alice/tiny").gated) == (True, "auto")
    assert len(first["notes"]) == 2
    push(hub, tmp_path / "home", release, "alice/tiny", "--public")
    assert (hub.repo("alice/tiny").private, hub.repo("alice/tiny").gated) == (False, "auto")
    push(hub, tmp_path / "home", release, "alice/tiny")  # without a word, what was chosen stays
    assert (hub.repo("alice/tiny").private, hub.repo("alice/tiny").gated) == (False, "auto")


def test_a_base_that_the_hub_does_not_show_keeps_the_release_private(release: Path, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        push(hub, tmp_path / "home", release, "alice/tiny", "--license", "apache-2.0")

        assert hub.repo("alice/tiny").private


def test_nothing_is_public_before_it_is_complete(hub: HubServer, release: Path, tmp_path: Path) -> None:
    push(hub, tmp_path / "home", release, "alice/tiny", "--gated", "manual")

    order = [request.line for request in hub.requests]
    created = next(n for n, line in enumerate(order) if "POST /api/repos/create" in line)
    shown = [n for n, line in enumerate(order) if "/commit/main" in line]
    settings = [n for n, line in enumerate(order) if line.startswith("PUT") and "/settings" in line]
    assert created < settings[0] < shown[0] < settings[1]  # the gate, the files, and then the public
    assert (len(shown), len(settings)) == (1, 2)
    assert hub.repo("alice/tiny").gated == "manual"


def test_a_name_that_the_licence_forbids_stops_the_push(
    hub: HubServer, snapshot: Path, tmp_path: Path, base: Path
) -> None:
    llama = tmp_path / "models--meta-llama--Llama-3.1-8B" / "snapshots" / ("d" * 40)
    shutil.copytree(snapshot, llama)
    prune(llama, tmp_path / "llama", importance="random", keep_first=1, keep_last=1)
    done = loram(hub, tmp_path / "home", "push", tmp_path / "llama", "alice/tiny")

    assert done.returncode == 2, done.stderr
    for part in ("begins with 'Llama'", "Llama-tiny", "LICENSE", "USE_POLICY.md", "Nothing was pushed"):
        assert part in done.stderr
    assert ("models", "alice/tiny") not in hub.repos


def test_all_duties_of_llama_can_be_met(hub: HubServer, snapshot: Path, tmp_path: Path) -> None:
    llama = tmp_path / "models--meta-llama--Llama-3.1-8B" / "snapshots" / ("d" * 40)
    shutil.copytree(snapshot, llama)
    (llama / "LICENSE").write_text("Llama 3.1 Community License Agreement\n...\n")
    (llama / "USE_POLICY.md").write_text("# Llama 3.1 Acceptable Use Policy\n")
    prune(llama, tmp_path / "llama", importance="random", keep_first=1, keep_last=1)
    pushed = push(hub, tmp_path / "home", tmp_path / "llama", "alice/Llama-3.1-8B-LoRAM-0.85")

    files = hub.repo("alice/Llama-3.1-8B-LoRAM-0.85").files()
    assert all(duty["met"] for duty in pushed["duties"])
    assert {"LICENSE", "USE_POLICY.md", "Notice"} <= set(files)
    assert b"Llama 3.1 is licensed under the Llama 3.1 Community License" in files["Notice"]
    assert "Built with Llama" in files["README.md"].decode()


def test_a_tag_that_is_on_something_else_stops_the_push_before_the_upload(
    hub: HubServer, release: Path, tmp_path: Path
) -> None:
    commit = hub.add_repo("alice/tiny", {"notes.txt": b"something else"})
    hub.repo("alice/tiny").tags["v2"] = commit
    done = loram(hub, tmp_path / "home", "push", release, "alice/tiny", "--tag", "v2")

    assert done.returncode == 2, done.stderr
    assert "v2" in done.stderr
    assert hub.content_received == 0
    assert len(hub.repo("alice/tiny").history("main")) == 2


def test_a_new_release_replaces_the_old_one_in_one_commit(
    hub: HubServer, release: Path, snapshot: Path, tmp_path: Path
) -> None:
    push(hub, tmp_path / "home", release, "alice/tiny")
    before = dict(hub.repo("alice/tiny").files())
    hub.add_repo("alice/tiny", before | {"notebook.ipynb": b"{}", "handler.py": b"0", "docs/more.json": b"{}"})
    structure = {"importance": "random", "pruning_ratio": 0.2, "keep_first": 1, "keep_last": 1}
    prune(snapshot, tmp_path / "next", quantize=False, **structure)
    (tmp_path / "next" / "README.md").unlink(missing_ok=True)
    pushed = push(hub, tmp_path / "home", tmp_path / "next", "alice/tiny")

    repository = hub.repo("alice/tiny")
    assert pushed["deleted"] == []
    assert set(repository.files()) - {".gitattributes"} == PUBLISHED | {
        "notebook.ipynb",
        "handler.py",
        "docs/more.json",
    }
    assert repository.files()["loram.json"] == (tmp_path / "next" / "loram.json").read_bytes()
    assert len(repository.history("main")) == 4
    verified = loram(hub, tmp_path / "other-home", "verify", "alice/tiny")
    assert verified.returncode in (0, 3), verified.stderr  # 3: verify also names code that is never fetched
    opened = python(
        hub,
        tmp_path / "other-home",
        "from huggingface_hub import snapshot_download\nsnapshot_download('alice/tiny')\n"
        "from loram_hub.hub import fetch_release\nprint(json.dumps(fetch_release('alice/tiny')[0].commit))",
    )
    assert opened == pushed["commit"]  # whatever else lies in the cache


def test_files_of_an_earlier_push_go(hub: HubServer, release: Path, snapshot: Path, tmp_path: Path) -> None:
    shutil.copytree(snapshot, tmp_path / "models--org--base" / "snapshots" / snapshot.name)
    more = tmp_path / "models--org--base" / "snapshots" / snapshot.name
    (more / "added_tokens.json").write_text("{}")
    prune(more, tmp_path / "first", importance="random", pruning_ratio=0.4, keep_first=1, keep_last=1)
    push(hub, tmp_path / "home", tmp_path / "first", "alice/tiny")
    assert "added_tokens.json" in hub.repo("alice/tiny").files()
    pushed = push(hub, tmp_path / "home", release, "alice/tiny")

    assert pushed["deleted"] == ["added_tokens.json"]
    assert set(hub.repo("alice/tiny").files()) - {".gitattributes"} == PUBLISHED


def test_a_repository_with_weights_of_others_is_left_alone_unless_told(
    hub: HubServer, release: Path, tmp_path: Path
) -> None:
    hub.add_repo(
        "alice/other", {"model-00001-of-00002.safetensors": b"x" * 100, "README.md": b"# mine\n", "a.gguf": b"g"}
    )
    refused = push(hub, tmp_path / "home", release, "alice/other", code=2)
    assert "model-00001-of-00002.safetensors" in refused["error"]["message"]
    assert "--overwrite" in refused["error"]["message"]
    dry = loram(hub, tmp_path / "home", "push", release, "alice/other", "--dry-run")
    assert dry.returncode == 2
    assert "Would NOT push" in dry.stdout
    assert len(hub.repo("alice/other").history("main")) == 2

    done = push(hub, tmp_path / "home", release, "alice/other", "--overwrite")
    assert done["deleted"] == ["model-00001-of-00002.safetensors"]
    assert "a.gguf" in hub.repo("alice/other").files()


def test_an_adapter_does_not_replace_a_release(hub: HubServer, release: Path, recovered: Path, tmp_path: Path) -> None:
    push(hub, tmp_path / "home", release, "alice/tiny")
    failed = push(hub, tmp_path / "home", recovered, "alice/tiny", code=2)

    assert "holds a release" in failed["error"]["message"]
    push(hub, tmp_path / "home", recovered, "alice/adapter")
    assert "holds an adapter" in push(hub, tmp_path / "home", release, "alice/adapter", code=2)["error"]["message"]


def test_a_card_that_was_edited_on_the_hub_stays_with_its_release(
    hub: HubServer, release: Path, snapshot: Path, tmp_path: Path
) -> None:
    push(hub, tmp_path / "home", release, "alice/tiny")
    files = dict(hub.repo("alice/tiny").files())
    edited = files["README.md"] + b"\nWith love.\n"
    commit = hub.add_repo("alice/tiny", files | {"README.md": edited})

    assert push(hub, tmp_path / "home", release, "alice/tiny")["commit"] == commit
    assert hub.repo("alice/tiny").files()["README.md"] == edited
    prune(snapshot, tmp_path / "next", importance="random", pruning_ratio=0.2, keep_first=1, keep_last=1)
    push(hub, tmp_path / "home", tmp_path / "next", "alice/tiny")
    assert b"With love" not in hub.repo("alice/tiny").files()["README.md"]


def test_what_is_to_be_hidden_is_hidden_before_anything_is_uploaded(
    hub: HubServer, release: Path, tmp_path: Path
) -> None:
    hub.add_repo("alice/public", {"notes.md": b"public so far"})
    hub.repo("org/base").gated = "manual"
    hub.repo("org/base").allowed.add("alice")
    push(hub, tmp_path / "home", release, "alice/public")

    order = [request.line for request in hub.requests]
    hidden = next(n for n, line in enumerate(order) if line.startswith("PUT") and "/settings" in line)
    first = next(n for n, line in enumerate(order) if re.search("POST .*/(branch|commit)/|PUT /put", line))
    assert hidden < first
    assert (hub.repo("alice/public").private, hub.repo("alice/public").gated) == (True, "auto")


def test_a_repository_that_was_made_private_in_advance_stays_private(
    hub: HubServer, release: Path, tmp_path: Path
) -> None:
    hub.add_repo("alice/mine", {"notes.md": b"private"}, private=True, gated="manual")
    pushed = push(hub, tmp_path / "home", release, "alice/mine")

    assert (hub.repo("alice/mine").private, hub.repo("alice/mine").gated) == (True, "manual")
    assert "exists and is private" in pushed["notes"][0]


@pytest.mark.parametrize("cut", ["/commit/main", "/settings", "/tag/", "DELETE .*/branch/"])
def test_a_push_that_was_cut_ends_as_visible_as_one_that_was_not(
    hub: HubServer, release: Path, tmp_path: Path, cut: str
) -> None:
    hub.fault(cut, times=-1, status=403)
    push(hub, tmp_path / "home", release, "alice/tiny", "--tag", "v1", code=5)
    hub.faults.clear()
    pushed = push(hub, tmp_path / "home", release, "alice/tiny", "--tag", "v1")

    repository = hub.repo("alice/tiny")
    assert (repository.private, repository.gated) == (False, False)
    assert repository.tags == {"v1": pushed["commit"]}
    assert set(repository.refs) == {"main"}
    assert len(repository.history("main")) == 2


def test_a_commit_of_someone_else_during_the_upload_is_not_overwritten(
    hub: HubServer, release: Path, tmp_path: Path
) -> None:
    hub.add_repo("alice/tiny", {"notes.md": b"first"})
    hub.fault("POST .*/commit/loram-push", delay=1.5)

    def meddle() -> None:
        while not hub.count("POST .*/commit/loram-push"):
            time.sleep(0.02)
        hub.add_repo("alice/tiny", {"notes.md": b"second"})

    colleague = threading.Thread(target=meddle)
    colleague.start()
    failed = push(hub, tmp_path / "home", release, "alice/tiny", code=5)
    colleague.join()

    assert "Someone else committed" in failed["error"]["message"]
    assert hub.repo("alice/tiny").files()["notes.md"] == b"second"
    push(hub, tmp_path / "home", release, "alice/tiny")
    assert hub.repo("alice/tiny").files()["notes.md"] == b"second"


def test_the_same_push_twice_at_once_ends_in_one_commit(hub: HubServer, release: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(push, hub, tmp_path / f"home{n}", release, "alice/tiny") for n in range(2)]
        commits = {done.result()["commit"] for done in both}

    assert len(commits) == 1
    assert len(hub.repo("alice/tiny").history("main")) == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("nameless",), "org/name"),
        (("alice/tiny", "--tag", "v 1"), "no name for a tag"),
        (("alice/tiny", "--tag", "main"), "no name for a tag"),
        (("alice/tiny", "--collection", " "), "no name"),
    ],
)
def test_names_are_checked_before_anything_is_asked(
    hub: HubServer, release: Path, tmp_path: Path, arguments: tuple[str, ...], part: str
) -> None:
    failed = push(hub, tmp_path / "home", release, *arguments, code=2)

    assert part in failed["error"]["message"]
    assert hub.matching(CHANGES) == []


@pytest.mark.parametrize(
    ("token", "namespace", "part"),
    [
        ("hf_alice_read", "alice", "may only read"),
        ("hf_bob_write", "alice", "bob is no member of alice"),
        ("hf_bob_write", "org", "bob is no member of org"),
        (None, "alice", "not logged in"),
    ],
)
def test_a_dry_run_tells_who_may_not_write(
    hub: HubServer, release: Path, tmp_path: Path, token: str | None, namespace: str, part: str
) -> None:
    done = loram(hub, tmp_path / "home", "push", release, f"{namespace}/tiny", "--dry-run", token=token)

    assert done.returncode == 2, done.stderr
    assert part in done.stdout
    assert "Would NOT push" in done.stdout


def test_a_commit_of_someone_else_during_the_push_is_not_overwritten(
    hub: HubServer, release: Path, tmp_path: Path
) -> None:
    hub.fault("POST .*/commit/main", status=412)
    failed = push(hub, tmp_path / "home", release, "alice/tiny", code=5)

    assert "Someone else committed" in failed["error"]["message"]
    assert set(hub.repo("alice/tiny").files()) == {".gitattributes"}
    sent = hub.content_received
    push(hub, tmp_path / "home", release, "alice/tiny")
    assert hub.content_received == sent


def test_an_altered_release_is_not_pushed(hub: HubServer, release: Path, tmp_path: Path) -> None:
    altered = tmp_path / "altered"
    shutil.copytree(release, altered)
    data = bytearray((altered / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (altered / "model.safetensors").write_bytes(data)
    failed = push(hub, tmp_path / "home", altered, "alice/tiny", code=3)

    assert "model.safetensors" in failed["error"]["message"]
    assert hub.matching(CHANGES) == []


@pytest.mark.parametrize("name", ["optimizer.pt", "training_args.bin", "modeling_llama.py", "notes.log"])
def test_what_does_not_belong_into_a_release_does_not_get_onto_the_hub(
    hub: HubServer, release: Path, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(release, copy)
    (copy / name).write_bytes(b"whatever")
    done = loram(hub, tmp_path / "home", "push", copy, "alice/tiny")

    assert done.returncode == 3, done.stderr
    assert name in done.stderr
    assert hub.matching(CHANGES) == []


@pytest.mark.parametrize(
    ("token", "code"), [("hf_alice_read", 5), ("hf_bob_write", 5), (None, 5), ("hf_nobody_knows_this_one", 5)]
)
def test_a_token_that_may_not_write_is_exit_code_5(
    hub: HubServer, release: Path, tmp_path: Path, token: str | None, code: int
) -> None:
    done = loram(hub, tmp_path / "home", "push", release, "alice/tiny", token=token)

    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert token is None or token not in done.stdout + done.stderr


@pytest.fixture
def recovered(release: Path, tmp_path: Path) -> Path:
    from loram_hub.release import open_metadata

    tensors = random_factors(projections(open_metadata(release).plan))
    recover(save_adapter(tmp_path / "pruned", tensors, base=release), tmp_path / "recovered", release=release)
    return tmp_path / "recovered"


def test_a_recovered_adapter_opens_by_its_id_in_peft(hub: HubServer, recovered: Path, tmp_path: Path) -> None:
    push(hub, tmp_path / "home", recovered, "alice/adapter")

    files = hub.repo("alice/adapter").files()
    assert set(files) == {
        ".gitattributes", "LICENSE", "README.md", "adapter_config.json", "adapter_model.safetensors", "loram.json"
    }  # fmt: skip
    card = files["README.md"].decode()
    for part in ("base_model: org/base", "base_model_relation: adapter", "library_name: peft"):
        assert part in card
    deltas = python(
        hub,
        tmp_path / "other-home",
        """
import warnings; warnings.simplefilter("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("org/base")
before = {name: value.double().clone() for name, value in base.state_dict().items()}
merged = PeftModel.from_pretrained(base, "alice/adapter").merge_and_unload().state_dict()
print(json.dumps({n: float((v.double() - before[n]).norm()) for n, v in merged.items() if "proj" in n}))
""",
    )
    factors = load_file(recovered / "adapter_model.safetensors")
    for name, norm in deltas.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" not in factors:
            assert norm == 0
            continue
        lora_A, lora_B = (factors[f"{prefix}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        assert norm == pytest.approx(2 * np.linalg.norm(lora_B @ lora_A), rel=0.02)  # alpha 8, r 4; the base is bf16


def test_a_pruned_adapter_is_refused_with_what_to_run_first(hub: HubServer, recovered: Path, tmp_path: Path) -> None:
    failed = push(hub, tmp_path / "home", recovered.with_name("pruned"), "alice/adapter", code=4)

    assert "loram recover" in failed["error"]["message"]
    assert hub.matching(CHANGES) == []
