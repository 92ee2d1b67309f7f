"""A release by its recipe: what is made, what is kept, what is made again and why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, HfApi, close_session, constants
from pipeline_materials import content_of, save_texts, save_tiny_base, tiny_recipe, write_recipe

from loram_hub.cli import main
from loram_hub.errors import InvalidRequestError, LoramError, MissingDependencyError, ResourceError, TrainingError
from loram_hub.files import read_json
from loram_hub.manifest import read_manifest
from loram_hub.pipeline import Published, check_publish, publish, recipe_from
from loram_hub.pipeline.launching import check_launcher, run_command
from loram_hub.pipeline.materials import find_materials
from loram_hub.release import verify

STAGES = ["prune", "align", "quantize", "evaluate", "card"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, texts and a finished work folder."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_tiny_base(folder / "base")
    save_texts(folder / "texts.jsonl")
    publish(recipe_from(tiny_recipe(folder)), work_dir=folder / "work")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it; what only the outside of the work folder holds is shared."""
    shutil.copytree(made / "work", tmp_path / "work")
    for name in ("base", "texts.jsonl"):
        os.symlink(made / name, tmp_path / name)
    return tmp_path


def run(place: Path, recipe: dict[str, Any], **options: Any) -> Published:
    return publish(recipe_from(recipe), work_dir=place / "work", **options)


def stages_made(published: Published) -> list[str]:
    return [stage.name for stage in published.stages if stage.made]


def why(published: Published, name: str) -> str:
    return next(stage.why for stage in published.stages if stage.name == name)


def test_all_stages_leave_a_release_that_verifies(made: Path) -> None:
    release = verify(made / "work" / "quantized", ignored=lambda name: name.endswith((".md", ".png")))

    assert release.is_quantized
    assert release.manifest.base.id == "base"
    assert release.manifest.alignment is not None
    assert release.manifest.alignment["tokens"] == 4 * 4 * 16
    losses = read_json(made / "work" / "evaluation.json")
    assert [row["model"] for row in losses["rows"]] == ["base", "pruned"]
    card = (made / "work" / "quantized" / "README.md").read_text()
    assert "license: mit" in card
    assert f"{losses['rows'][1]['loss']:.3f}"[:4] in card


def test_a_second_run_makes_nothing_and_changes_nothing(place: Path) -> None:
    before = content_of(place / "work")

    published = run(place, tiny_recipe(place))

    assert stages_made(published) == []
    assert [stage.name for stage in published.stages] == STAGES
    assert content_of(place / "work") == before


def test_a_changed_setting_redoes_its_stage_and_what_depends_on_it(place: Path) -> None:
    recipe = tiny_recipe(place)
    recipe["align"] |= {"steps": 5}

    preview = check_publish(recipe_from(recipe), work_dir=place / "work")
    assert [(row.name, row.state) for row in preview.rows] == [
        ("prune", "holds"), ("align", "to do"), ("quantize", "to do"), ("evaluate", "to do"), ("card", "to do"),
    ]  # fmt: skip
    assert preview.rows[1].why == "steps 4 -> 5"
    assert preview.rows[2].why == "align will be made anew"

    published = run(place, recipe)
    assert stages_made(published) == STAGES[1:]
    assert why(published, "align") == "steps 4 -> 5"
    assert why(published, "quantize").startswith("align changed (")
    alignment = read_manifest(place / "work" / "aligned").alignment
    assert alignment is not None
    assert alignment["steps"] == 5


def test_settings_that_do_not_decide_over_the_result_redo_nothing(place: Path) -> None:
    recipe = tiny_recipe(place, hardware={"gpu": "H100", "memory_gib": 80, "tflops": 989, "price_per_gpu_hour": 2})
    recipe["align"] |= {"micro_batch_size": 2, "keep_checkpoints": 1, "report_to": []}

    assert stages_made(run(place, recipe)) == []


def test_what_comes_out_as_it_was_lets_later_stages_hold(place: Path) -> None:
    shutil.rmtree(place / "work" / "pruned")

    published = run(place, tiny_recipe(place))

    assert stages_made(published) == ["prune"]


def test_a_changed_output_is_noticed_and_made_again(place: Path) -> None:
    whole = content_of(place / "work" / "aligned")
    weights = next((place / "work" / "aligned").glob("model*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    time.sleep(0.2)
    weights.write_bytes(data)

    published = run(place, tiny_recipe(place))

    assert stages_made(published) == ["align"]
    assert "safetensors" in why(published, "align")
    assert content_of(place / "work" / "aligned") == whole


def test_changed_data_redoes_what_reads_it(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "work", tmp_path / "work")
    os.symlink(made / "base", tmp_path / "base")
    recipe = tiny_recipe(made)
    recipe["evaluate"]["data"] = str(save_texts(tmp_path / "other.jsonl", seed=1))

    published = run(tmp_path, recipe)

    assert stages_made(published)[0] == "evaluate"
    assert why(published, "evaluate").startswith("data changed (")


def test_another_version_of_a_tool_redoes_what_it_shaped_unless_told_not_to(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loram_hub.pipeline import assessment

    versions = assessment.tool_versions()
    monkeypatch.setattr(assessment, "tool_versions", lambda: versions | {"torch": "99.0"})

    preview = check_publish(recipe_from(tiny_recipe(place)), work_dir=place / "work")
    assert preview.rows[0].why == f"torch {versions['torch']} -> 99.0"
    assert all(row.is_to_do for row in preview.rows)
    kept = check_publish(recipe_from(tiny_recipe(place)), work_dir=place / "work", ignore_versions=True)
    assert not any(row.is_to_do for row in kept.rows)


def test_another_version_of_a_tool_trains_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loram_hub.pipeline import assessment

    log = place / "work" / "aligned-run" / "log.jsonl"
    before = log.stat().st_mtime_ns
    versions = assessment.tool_versions()
    monkeypatch.setattr(assessment, "tool_versions", lambda: versions | {"torch": "99.0"})

    assert stages_made(run(place, tiny_recipe(place), until="align")) == ["prune", "align"]

    assert log.stat().st_mtime_ns > before
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert max(steps) == 4


def test_defaults_that_are_written_out_redo_nothing(place: Path) -> None:
    recipe = tiny_recipe(place, device="cpu")
    recipe["prune"] |= {"importance": "taylor:param_first"}
    recipe["evaluate"] |= {"device": "cpu"}

    preview = check_publish(recipe_from(recipe), work_dir=place / "work")

    assert [row.state for row in preview.rows] == ["holds"] * 5


def test_a_local_corpus_is_known_by_all_of_its_content_and_not_by_its_name(made: Path, tmp_path: Path) -> None:
    def digest(source: Path) -> str:
        recipe = tiny_recipe(made)
        recipe["align"]["corpora"] = [{"source": str(source)}]
        return find_materials(recipe_from(recipe), {}, token=None).digests["corpora"]

    texts = save_texts(tmp_path / "texts.jsonl", count=1200)
    data = bytearray(texts.read_bytes())
    assert len(data) > 4 * 64 * 1024
    before, alone = digest(texts), digest(tmp_path)
    texts = texts.rename(tmp_path / "renamed.jsonl")
    assert digest(texts) == before
    assert digest(tmp_path) != alone  # in a folder, names decide over the order

    middle = data.index(b"w", len(data) // 2)
    data[middle + 1 : middle + 2] = b"5" if data[middle + 1 : middle + 2] != b"5" else b"4"
    time.sleep(0.2)
    texts.write_bytes(data)
    assert digest(texts) != before


def test_until_stops_after_a_stage_and_the_next_run_goes_on(made: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(made)

    first = run(tmp_path, recipe, until="align")
    assert stages_made(first) == ["prune", "align"]
    assert not (tmp_path / "work" / "quantized").exists()
    assert stages_made(run(tmp_path, recipe)) == ["quantize", "evaluate", "card"]
    for name in ("pruned", "aligned", "quantized"):  # in another folder, and yet the same bytes
        assert content_of(tmp_path / "work" / name) == content_of(made / "work" / name)


def test_intermediate_outputs_go_when_nothing_needs_them_and_come_back_when_something_does(place: Path) -> None:
    recipe = tiny_recipe(place)
    shutil.rmtree(place / "work" / "quantized")

    run(place, recipe, keep_intermediate=False)
    assert not (place / "work" / "pruned").exists()
    assert not (place / "work" / "aligned").exists()
    assert stages_made(run(place, recipe)) == []

    shutil.rmtree(place / "work" / "quantized")
    again = run(place, recipe)
    assert stages_made(again) == ["prune", "align", "quantize", "card"]
    assert why(again, "prune") == "was deleted; align needs it"


def test_an_edited_card_is_kept_until_what_it_describes_changes(place: Path) -> None:
    card = place / "work" / "quantized" / "README.md"
    card.write_text(card.read_text() + "\nMade with care.\n")
    recipe = tiny_recipe(place)

    assert stages_made(run(place, recipe)) == []
    assert "Made with care." in card.read_text()

    recipe["align"] |= {"steps": 5}
    with pytest.raises(InvalidRequestError, match=r"README.md was edited.*Keep a copy"):
        run(place, recipe)
    assert "Made with care." in card.read_text()
    with pytest.raises(InvalidRequestError, match=r"README.md was edited"):
        run(place, recipe, until="quantize")
    assert "Made with care." in card.read_text()
    card.unlink()
    assert "card" in stages_made(run(place, recipe))


def test_distillation_and_refit_join_in(made: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(made, refit={}, teach={"k": 4, "block_sequences": 8})
    recipe["align"] |= {"distillation": 0.5}

    published = run(tmp_path, recipe, until="align")

    assert stages_made(published) == ["prune", "refit", "teach", "align"]
    alignment = read_manifest(tmp_path / "work" / "aligned").alignment
    assert alignment is not None
    assert alignment["distillation"] == 0.5
    assert alignment["refit"]["target"] == "residual"

    shard = next((tmp_path / "work" / "teacher").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    time.sleep(0.2)
    shard.write_bytes(data)
    rows = check_publish(recipe_from(recipe), work_dir=tmp_path / "work").rows
    assert [row.name for row in rows if row.is_to_do][:2] == ["teach", "align"]
    assert f"{shard.name} has another SHA-256" in rows[2].why


def test_a_dry_run_checks_everything_and_writes_nothing(made: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(made)
    recipe["align"]["corpora"] = [{"source": str(made / "texts.jsonl"), "column": "body"}]
    recipe["evaluate"]["data"] = str(tmp_path)

    preview = check_publish(recipe_from(recipe), work_dir=tmp_path / "work")

    assert [row.state for row in preview.rows] == ["to do"] * 5
    assert any("has no column 'body'" in problem for problem in preview.problems)
    assert any("holds no text" in problem for problem in preview.problems)
    assert not (tmp_path / "work").exists()
    with pytest.raises(LoramError, match=r"2 things stop it. \(1\)"):
        publish(recipe_from(recipe), work_dir=tmp_path / "work")
    assert not (tmp_path / "work" / "pruned").exists()


def test_estimates_come_with_time_and_money(made: Path, tmp_path: Path) -> None:
    hardware = {"gpu": "H100", "count": 8, "memory_gib": 80, "tflops": 989, "price_per_gpu_hour": 2.0}

    preview = check_publish(recipe_from(tiny_recipe(made, hardware=hardware)), work_dir=tmp_path / "work")

    align = preview.rows[1]
    assert align.name == "align"
    assert align.seconds is not None
    assert align.price == pytest.approx(align.seconds / 3600 * 8 * 2)
    assert preview.seconds == pytest.approx(sum(row.seconds or 0 for row in preview.rows))
    assert preview.disk_bytes > sum(row.cost.output_bytes for row in preview.rows)
    assert json.loads(json.dumps(preview.to_dict()))["stages"][1]["name"] == "align"


def test_too_little_room_is_said_before_anything_is_made(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))  # type: ignore[attr-defined]

    with pytest.raises(ResourceError, match=r"0\.0 GB free.*--work-dir"):
        run(tmp_path, tiny_recipe(made))
    assert not (tmp_path / "work" / "pruned").exists()


def test_two_runs_do_not_share_a_folder(made: Path, tmp_path: Path) -> None:
    def second(_: object) -> None:
        with pytest.raises(ResourceError, match="Another process is publishing from"):
            run(tmp_path, tiny_recipe(made))

    run(tmp_path, tiny_recipe(made), until="prune", announce=second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"until": "allign"}, "until is 'allign'; the stages are prune, refit"),
        ({"until": "push"}, "The recipe has no stage 'push'; it has prune, align"),
    ],
)
def test_a_stage_that_there_is_not_is_refused(made: Path, tmp_path: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        run(tmp_path, tiny_recipe(made), **change)


def test_a_missing_package_is_said_beforehand(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loram_hub.pipeline import checks

    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "matplotlib" else object())

    with pytest.raises(MissingDependencyError, match="card needs matplotlib"):
        run(tmp_path, tiny_recipe(made))


def test_one_of_many_processes_does_not_publish(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")

    with pytest.raises(InvalidRequestError, match=r"started in 8 processes\. Start it once"):
        run(tmp_path, tiny_recipe(made))


def test_a_damaged_record_means_that_the_stage_is_made_again(place: Path) -> None:
    record = place / "work" / ".publish" / "quantize.json"
    record.write_text(record.read_text().replace("nf4", "nf5"))

    assert stages_made(run(place, tiny_recipe(place))) == ["quantize", "card"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that this very process talks to."""
    with HubServer(tmp_path / "hub") as server:
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address.replace(constants.ENDPOINT, server.url))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        close_session()  # one that an earlier test opened
        yield server
        close_session()


def test_what_was_changed_on_the_hub_is_set_right_or_kept(place: Path, hub: HubServer) -> None:
    token, name = "hf_alice_write", "org/Tiny-LoRAM"
    recipe = tiny_recipe(place, push={"tag": "v1", "private": False, "gated": False})
    api = HfApi(endpoint=hub.url, token=token)

    def push(**changes: Any) -> Published:
        return run(place, recipe | ({"push": recipe["push"] | changes} if changes else {}), token=token)

    first = push()
    assert stages_made(first) == ["push"]
    assert stages_made(push()) == []
    api.update_repo_settings(name, private=True, gated="auto")
    assert why(push(), "push") == f"{name} is private, not public."
    assert api.model_info(name).private is False
    assert api.model_info(name).gated is False
    api.delete_tag(name, tag="v1")
    assert why(push(), "push") == f"{name} has no tag v1."
    assert hub.repo(name).tags == {"v1": first.commit}

    edited = b"---\nlicense: mit\n---\n# By hand\n"
    api.create_commit(name, [CommitOperationAdd("README.md", edited)], commit_message="Edit")
    card = place / "work" / "quantized" / "README.md"
    made_here = card.read_bytes()
    with pytest.raises(InvalidRequestError, match=r"README.md of org/Tiny-LoRAM.*edited on the Hub.*push.overwrite"):
        push(tag="v2")
    assert hub.repo(name).files()["README.md"] == edited
    card.write_bytes(edited)
    assert stages_made(push(tag="v2")) == ["push"]
    assert hub.repo(name).files()["README.md"] == edited

    api.create_commit(name, [CommitOperationAdd("README.md", edited + b"More.\n")], commit_message="Edit again")
    card.write_bytes(made_here)
    push(tag="v3", overwrite=True)
    assert hub.repo(name).files()["README.md"] == made_here


LAUNCHED = """
import json, os, sys
from pathlib import Path
if "{fail}":
    print('0: ' + json.dumps({{"error": {{"code": 1, "kind": "{fail}", "message": "step 3 went wrong"}}}}))
    sys.exit(1)
settings = json.loads(Path(sys.argv[sys.argv.index("--settings") + 1]).read_text())
Path({seen!r}).write_text(json.dumps([sys.argv[1:], settings, os.environ["LORAM_LAUNCHED_BY"]]))
Path({out!r}).mkdir()
"""


def fake_launcher(folder: Path, *, fail: str = "") -> tuple[str, ...]:
    """A launcher that writes down what it is asked to start."""
    script = folder / "launcher.py"
    script.write_text(LAUNCHED.format(fail=fail, seen=str(folder / "seen.json"), out=str(folder / "out")))
    return (sys.executable, str(script))


def test_a_launcher_is_given_the_command_and_its_settings(tmp_path: Path) -> None:
    run_command(fake_launcher(tmp_path), "align", {"steps": 3}, "a", "b", beside=tmp_path / "out", token=None)

    arguments, settings, launched_by = json.loads((tmp_path / "seen.json").read_text())
    assert arguments[:5] == ["-m", "loram_hub", "align", "a", "b"]
    assert settings == {"steps": 3}
    assert launched_by == f"{socket.gethostname()}:{os.getpid()}"
    assert not (tmp_path / ".out.settings.json").exists()


def test_the_error_of_a_launched_process_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 3 went wrong"):
        run_command(
            fake_launcher(tmp_path, fail="TrainingError"), "align", {}, "a", "b", beside=tmp_path / "out", token=None
        )
    with pytest.raises(LoramError, match="ended with status 3"):
        run_command(
            (sys.executable, "-c", "raise SystemExit(3)"), "align", {}, "a", beside=tmp_path / "out", token=None
        )
    with pytest.raises(LoramError, match=r"ended with status 0, and .*out is not there"):
        run_command((sys.executable, "-c", ""), "align", {}, "a", beside=tmp_path / "out", token=None)
    with pytest.raises(InvalidRequestError, match="no command on this machine"):
        run_command(("no-such-launcher",), "align", {}, beside=tmp_path / "out", token=None)


def test_only_variables_of_a_launcher_have_to_be_set(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*launcher: str) -> None:
        recipe = tiny_recipe(made)
        check_launcher(recipe_from(recipe | {"align": recipe["align"] | {"launcher": [sys.executable, *launcher]}}))

    monkeypatch.setenv("LORAM_TEST_HOST", "pays$5")
    check("--cost=5$", "$", "--host=$LORAM_TEST_HOST", "${LORAM_TEST_HOST}")
    for part in ("--token=secret-$LORAM_TEST_NONE", "--token=secret-${LORAM_TEST_NONE}"):
        with pytest.raises(InvalidRequestError, match="the variable 'LORAM_TEST_NONE'") as caught:
            check(part)
        assert "secret" not in str(caught.value)


ORPHAN = """
import os, sys
from pathlib import Path
from loram_hub.pipeline.launching import run_command
child = "import os, sys, time; open(sys.argv[-4], 'w').write(str(os.getpid())); time.sleep(60)"
run_command((sys.executable, "-c", child), "align", {}, sys.argv[1], beside=Path(sys.argv[2]), token=None)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel of Linux ends children with their parent")
def test_launched_processes_end_with_us_however_we_end(tmp_path: Path, figure: Callable[[str], None]) -> None:
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, str(pid_file), str(tmp_path / "out")])
    deadline = time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(pid_file.read_text())

    parent.send_signal(signal.SIGKILL)
    parent.wait()

    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def loram(*arguments: object) -> dict[str, Any]:
    """Run the command in this process, which has imported everything already."""
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert done.exit_code in (0, 2), done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_steps_are_commands_of_their_own(made: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(
        "steps: 3\nwarmup_steps: 1\nbatch_size: 4\nsequence_length: 16\nheld_out: 1\n"
    )
    common = ("--corpus", made / "texts.jsonl", "--settings", tmp_path / "settings.yaml")
    pruned, out = made / "work" / "pruned", tmp_path / "out"

    dry = loram("align", pruned, out, *common, "--steps", 2, "--trainable", "no-embeddings", "--dry-run")
    assert (dry["tokens"], dry["processes"]) == (2 * 4 * 16, 1)
    assert dry["trained_parameters"] < dry["parameters"]
    aligned = loram("align", pruned, out, *common, "--steps", 2)
    assert aligned["alignment"]["tokens"] == 2 * 4 * 16
    assert aligned["alignment"]["held_out"]

    taught = loram("teach", made / "base", tmp_path / "teacher", "--corpus", made / "texts.jsonl", "--steps", 2,
                   "--batch-size", 4, "--sequence-length", 16, "--held-out", 1, "--k", 4)  # fmt: skip
    assert (taught["sequences"], taught["k"]) == (8, 4)
    refitted = loram("refit", pruned, tmp_path / "refitted", "--base", made / "base", "--calibration",
                     made / "texts.jsonl", "--target", "output", "--dry-run")  # fmt: skip
    assert refitted["layers"] == 4


def test_publish_shows_what_it_would_do_as_json(made: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(made))

    dry = loram("publish", recipe, "--work-dir", tmp_path / "work", "--dry-run", "--repo-id", "me/other")
    assert dry["repo_id"] == "me/other"
    assert [row["name"] for row in dry["stages"]] == STAGES
    assert dry["problems"] == []
    done = CliRunner().invoke(main, ["publish", str(recipe), "--work-dir", str(tmp_path / "work"), "--until", "prune"])
    assert done.exit_code == 0, done.output
    assert "not made yet" in done.stderr
    assert "made" in done.stdout
    typo = write_recipe(tmp_path / "typo.yaml", tiny_recipe(made) | {"aling": {}})
    failed = CliRunner().invoke(main, ["publish", str(typo), "--json"])
    assert failed.exit_code == 2
    assert "did you mean 'align'?" in json.loads(failed.stdout)["error"]["message"]


def test_a_licence_text_that_must_travel_along_is_missed_before_the_work(made: Path, tmp_path: Path) -> None:
    base = shutil.copytree(made / "base", tmp_path / "base")
    (base / "LICENSE").unlink()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "apache.txt").write_text("Apache License\nVersion 2.0, January 2004\n")
    recipe = tiny_recipe(made, base=str(base), push={}, evaluate=None)

    def problems(recipe: dict[str, Any]) -> str:
        return " ".join(check_publish(recipe_from(recipe), work_dir=tmp_path / "work").problems)

    assert "a copy of the Apache License 2.0 travels along" in problems(recipe)
    assert "travels along" not in problems(recipe | {"license_file": str(tmp_path / "apache.txt")})
    run(tmp_path, recipe | {"license_file": str(tmp_path / "apache.txt")}, until="card")
    release = tmp_path / "work" / "quantized"
    assert (release / "LICENSE").read_text() == (tmp_path / "apache.txt").read_text()
    verify(release, ignored=lambda name: name.endswith((".md", ".png")))
    (base / "LICENSE").write_text("Apache License")
    with pytest.raises(InvalidRequestError, match="has a LICENSE of its own"):
        problems(recipe | {"license_file": str(tmp_path / "apache.txt")})
