"""Checkpoints of a stock Trainer: sealed, resumed from exactly, each with its recovered adapter; torn ones are left."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from killed import bytes_of
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from tiny_finetuning import STEPS, save_tiny_release, tiny_trainer
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerState, TrainingArguments

from loram_hub.adapter import check_adapter
from loram_hub.auto import AutoLoramModel
from loram_hub.cli import main
from loram_hub.errors import (
    CheckpointError,
    InvalidRequestError,
    PlanMismatchError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.finetuning.callbacks import RecoverCallback, SealCallback
from loram_hub.finetuning.checkpoints import SEAL_FILE, latest_checkpoint, open_checkpoint
from loram_hub.recovery import recover
from loram_hub.release import open_metadata
from loram_hub.seals import seal

STATE = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NF4 release: on it TRL trains bfloat16 factors."""
    return save_tiny_release(tmp_path_factory.mktemp("made") / "release")


@pytest.fixture(scope="module")
def run(release: Path) -> Path:
    """An undisturbed run that kept all its checkpoints."""
    out = release.with_name("run")
    tiny_trainer(release, out, [RecoverCallback(), SealCallback(keep=10)]).train()
    return out


def begun(run: Path, out: Path, *steps: int) -> Path:
    """Copy a run as it was after its first checkpoints."""
    shutil.copytree(run, out, ignore=lambda _, names: [n for n in names if n.startswith(("checkpoint", "recovered"))])
    for step in steps:
        shutil.copytree(run / f"checkpoint-{step}", out / f"checkpoint-{step}")
    return out


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.symlink_to(path.rename(path.parent.parent / path.name))


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def reseal(checkpoint: Path, **changes: object) -> None:
    """Write other values into a seal, as somebody can who may write the folder."""
    values = json.loads((checkpoint / SEAL_FILE).read_text())
    del values["sha256"]
    (checkpoint / SEAL_FILE).write_text(seal(values | changes))


def test_every_checkpoint_of_a_stock_trainer_is_sealed_and_has_its_recovered_adapter(
    release: Path, run: Path, tmp_path: Path
) -> None:
    steps = [2, 4, 6, STEPS]

    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == sorted(
        [f"{kind}-{step}" for kind in ("checkpoint", "recovered") for step in steps]
    )
    plan = open_metadata(release).plan.digest
    for step in steps:
        found = open_checkpoint(run / f"checkpoint-{step}")
        assert (found.step, found.max_steps, found.processes, found.plan_sha256) == (step, STEPS, 1, plan)
        assert found.has_stopped == (step == STEPS)
        assert json.loads((found.folder / "loram.json").read_text()) == {"plan_sha256": plan}
        recover(found.folder, tmp_path / f"{step}")
        assert bytes_of(run / f"recovered-{step}") == bytes_of(tmp_path / f"{step}")
        assert check_adapter(run / f"recovered-{step}").kind == "recovered adapter"
    assert len({(run / f"recovered-{step}" / "adapter_model.safetensors").read_bytes() for step in steps}) == len(steps)


def test_the_recovered_adapter_of_a_checkpoint_runs_on_the_base(release: Path, run: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(release.with_name("release-base"), dtype=torch.float32)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, str(run / "recovered-2"))(ids).logits
    assert float((after - before).abs().max()) > 0


@pytest.mark.parametrize("step", [2, 4, 6])  # within an epoch, at its end, and within the next
def test_a_run_that_resumes_ends_as_if_it_had_not_stopped(release: Path, run: Path, tmp_path: Path, step: int) -> None:
    out = begun(run, tmp_path / "run", step)
    callbacks = [RecoverCallback(), SealCallback(keep=10)]

    trainer = tiny_trainer(release, out, callbacks)
    trainer.train(resume_from_checkpoint=latest_checkpoint(out))  # type: ignore[arg-type]  # a path to `os.path`

    for name in STATE:
        assert (out / f"checkpoint-{STEPS}" / name).read_bytes() == (run / f"checkpoint-{STEPS}" / name).read_bytes()
    assert bytes_of(out / f"recovered-{STEPS}") == bytes_of(run / f"recovered-{STEPS}")
    assert bytes_of(out / f"recovered-{step}") == bytes_of(run / f"recovered-{step}")  # which was missing
    with safe_open(out / f"checkpoint-{STEPS}" / STATE[0], framework="np") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys() if "lora_A" in name or "lora_B" in name}  # noqa: SIM118
    assert dtypes == {"BF16"}


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "no trainer state": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "no seal": (lambda folder: (folder / SEAL_FILE).unlink(), f"no {SEAL_FILE}"),
    "flipped adapter": (lambda folder: flip(folder / "adapter_model.safetensors"), "adapter_model.safetensors was al"),
    "flipped optimizer": (lambda folder: flip(folder / "optimizer.pt"), "optimizer.pt was altered"),
    "flipped seal": (lambda folder: flip(folder / SEAL_FILE), SEAL_FILE),
    "torn": (lambda folder: (folder / "optimizer.pt").write_bytes(b"PK"), "optimizer.pt has 2 bytes"),
    "other state": (
        lambda folder: shutil.copy(folder.with_name("checkpoint-2") / "rng_state.pth", folder), "rng_state.pth was al",
    ),
    "added": (lambda folder: (folder / "model.safetensors").touch(), "model.safetensors does not belong there"),
    "added below": (lambda folder: shutil.copytree(folder.parent / "recovered-2", folder / "a"), "does not belong"),
    "link": (lambda folder: link(folder / "README.md"), "README.md is no plain file"),
    "other step": (lambda folder: reseal(folder, step=2), "is of step 2"),
    "later format": (lambda folder: reseal(folder, format=2), "in format 2"),
    "empty": (lambda folder: empty(folder), f"no {SEAL_FILE}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_aloud_for_an_older_one(
    run: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = begun(run, tmp_path / "run", 2, 4)
    shutil.copytree(run / "recovered-2", out / "recovered-2")
    damage, reason = DAMAGE[kind]
    damage(out / "checkpoint-4")

    with caplog.at_level(logging.WARNING):
        found = latest_checkpoint(out)

    assert found is not None
    assert found.step == 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert reason in message
    assert "checkpoint-4" in message


def test_where_nothing_is_whole_there_is_nothing_to_resume_from(run: Path, tmp_path: Path) -> None:
    out = begun(run, tmp_path / "run", 2)
    (out / "checkpoint-2" / "optimizer.pt").unlink()
    (out / "checkpoint-007").mkdir()

    assert latest_checkpoint(out) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="checkpoint-N"):
        open_checkpoint(out)


def test_a_run_goes_back_behind_a_torn_checkpoint_and_writes_it_anew(
    release: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = begun(run, tmp_path / "run", 4, 6)
    (out / "checkpoint-6" / "optimizer.pt").unlink()
    (out / "checkpoint-6" / "left-over").touch()
    (out / ".checkpoint-2.removed").mkdir()

    with caplog.at_level(logging.WARNING):
        tiny_trainer(release, out).train(resume_from_checkpoint=str(out / "checkpoint-4"))

    assert f"Deleting {out / 'checkpoint-6'}" in caplog.text
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "checkpoint-6", "checkpoint-7", "recovered-6", "recovered-7",
    ]  # fmt: skip
    for step in (6, STEPS):
        assert bytes_of(out / f"recovered-{step}") == bytes_of(run / f"recovered-{step}")


def test_a_trainer_that_would_resume_from_a_torn_checkpoint_stops_before_its_first_step(
    release: Path, run: Path, tmp_path: Path
) -> None:
    out = begun(run, tmp_path / "run", 4)
    (out / "checkpoint-4" / "optimizer.pt").unlink()  # which the Trainer itself would not even mention
    trainer = tiny_trainer(release, out)

    with pytest.raises(VerificationError, match=r"optimizer\.pt is missing.*latest_checkpoint"):
        trainer.train(resume_from_checkpoint=True)

    assert trainer.state.global_step == 4


def test_a_run_that_has_ended_is_not_trained_further(release: Path, run: Path, tmp_path: Path) -> None:
    out = begun(run, tmp_path / "run", STEPS)

    with pytest.raises(InvalidRequestError, match="is where the run ended"):
        tiny_trainer(release, out).train(resume_from_checkpoint=latest_checkpoint(out))  # type: ignore[arg-type]

    longer = tiny_trainer(release, out, max_steps=STEPS + 1)
    longer.train(resume_from_checkpoint=latest_checkpoint(out))  # type: ignore[arg-type]
    assert longer.state.global_step == STEPS + 1


def test_an_early_stop_is_not_forgotten(release: Path, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
            control.should_training_stop = state.global_step == 2  # type: ignore[attr-defined]

    tiny_trainer(release, tmp_path, [Stop(), SealCallback()]).train()

    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.has_stopped) == (2, True)
    with pytest.raises(InvalidRequestError, match="is where the run ended"):
        tiny_trainer(release, tmp_path).train(resume_from_checkpoint=str(found.folder))


def test_a_run_does_not_begin_among_the_checkpoints_of_another(release: Path, run: Path, tmp_path: Path) -> None:
    sealed = begun(run, tmp_path / "sealed", 2, 4)
    stock = begun(run, tmp_path / "stock", 2)
    (stock / ".sealed-checkpoints").unlink()
    (stock / "checkpoint-2" / SEAL_FILE).unlink()

    with pytest.raises(InvalidRequestError, match="checkpoint-2 is whole and of a later step than 0"):
        tiny_trainer(release, sealed).train()
    with pytest.raises(InvalidRequestError, match="checkpoint-4 is whole and of a later step than 2"):
        tiny_trainer(release, sealed).train(resume_from_checkpoint=str(sealed / "checkpoint-2"))
    with pytest.raises(InvalidRequestError, match="written by a run without SealCallback"):
        tiny_trainer(release, stock).train()
    assert (stock / "checkpoint-2" / "optimizer.pt").is_file()


def test_a_checkpoint_of_another_release_is_refused(run: Path, tmp_path: Path) -> None:
    other = save_tiny_release(tmp_path / "other", seed=1)
    out = begun(run, tmp_path / "run", 4)

    with pytest.raises(PlanMismatchError, match="Open the release that the run began with"):
        tiny_trainer(other, out, [SealCallback()]).train(resume_from_checkpoint=str(out / "checkpoint-4"))


def test_settings_that_would_undo_the_seal_are_refused(release: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="save_total_limit is 1"):
        tiny_trainer(release, tmp_path, save_total_limit=1).train()
    with pytest.raises(InvalidRequestError, match="save_only_model"):
        tiny_trainer(release, tmp_path, save_only_model=True).train()
    with pytest.raises(InvalidRequestError, match="at least 1"):
        SealCallback(keep=0)
    out = begun(run, tmp_path / "run", 4)
    late = tiny_trainer(release, out, [])
    late.add_callback(SealCallback())
    with pytest.raises(InvalidRequestError, match="added after the Trainer was made"):
        late.train(resume_from_checkpoint=str(out / "checkpoint-4"))


def test_a_best_checkpoint_that_is_damaged_does_not_count_any_more(
    release: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss",
        "greater_is_better": True, "max_steps": 4,
    }  # fmt: skip
    tiny_trainer(release, tmp_path, [SealCallback()], **settings).train()
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["best_global_step"] == 2
    flip(tmp_path / "checkpoint-2" / "adapter_model.safetensors")

    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(release, tmp_path, [SealCallback()], **settings | {"max_steps": 6})
        trainer.train(resume_from_checkpoint=latest_checkpoint(tmp_path))  # type: ignore[arg-type]

    assert f"{tmp_path / 'checkpoint-2'} was the best checkpoint and is lost" in caplog.text
    assert trainer.state.best_global_step == 6


def test_an_adapter_that_cannot_be_recovered_is_refused_before_the_first_step(release: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = tiny_trainer(release, tmp_path, lora=lora)

    with pytest.raises(UnsupportedAdapterError, match="use_dora"):
        trainer.train()

    assert trainer.state.global_step == 0


def test_a_release_that_nothing_names_must_be_given(release: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(release, tmp_path / "run", [RecoverCallback()], max_steps=2)
    assert isinstance(trainer.model, PeftModel)
    opened = trainer.model.get_base_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(opened), "loram", None)  # as if the model had been put together by other means
        with pytest.raises(InvalidRequestError, match=r"RecoverCallback\(release=...\)"):
            trainer.train()
    given = tiny_trainer(
        release, tmp_path / "given", [RecoverCallback(release, tmp_path / "elsewhere", dtype="float32")], max_steps=2
    )

    given.train()

    recover(tmp_path / "given" / "checkpoint-2", tmp_path / "by-hand", release=release, dtype="float32")
    assert bytes_of(tmp_path / "elsewhere" / "recovered-2") == bytes_of(tmp_path / "by-hand")


def test_recovered_adapters_go_with_their_checkpoints_and_nothing_else_does(release: Path, tmp_path: Path) -> None:
    for name in ("recovered-1", "recovered-of-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()

    tiny_trainer(release, tmp_path, [RecoverCallback(), SealCallback(keep=1)], max_steps=4).train()

    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "checkpoint-4", "recovered-1", "recovered-4", "recovered-of-mine",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT asks the Hub for the release's
def test_on_a_release_from_the_hub_the_adapter_names_its_commit(release: Path, tmp_path: Path) -> None:
    name, commit = "org/Tiny-LoRAM", "5" * 40
    cached = Path(constants.HF_HUB_CACHE) / "models--org--Tiny-LoRAM"
    shutil.copytree(release, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)

    tiny_trainer(name, tmp_path / "run", max_steps=2).train()  # type: ignore[arg-type]

    config = json.loads((tmp_path / "run" / "checkpoint-2" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (name, commit)
    found = recover(tmp_path / "run" / "checkpoint-2", tmp_path / "recovered")
    assert (found.release_commit, found.assumed) == (commit, False)


def test_a_checkpoint_is_recovered_by_the_command_and_is_neither_adapter_nor_release_to_others(
    run: Path, tmp_path: Path
) -> None:
    checkpoint = run / "checkpoint-4"

    done = CliRunner().invoke(main, ["recover", str(checkpoint), str(tmp_path / "out")], catch_exceptions=False)

    assert done.exit_code == 0, done.output
    assert bytes_of(tmp_path / "out") == bytes_of(run / "recovered-4")
    with pytest.raises(VerificationError, match="is no part of an adapter"):
        check_adapter(checkpoint)
    with pytest.raises(VerificationError):
        AutoLoramModel.from_pretrained(checkpoint)
    assert open_checkpoint(checkpoint).step == 4  # nobody has written into it
