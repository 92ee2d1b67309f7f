"""Adapters are trained on sparse releases, masked or not, survive interruptions, and go to the base as they are."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import save_metadata_release, sparse_config, sparse_release, tiny_config
from click.testing import CliRunner
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from tiny_finetuning import examples, save_sparse_release, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl.trainer.sft_trainer import SFTTrainer

import loram_hub.cli.finetuning  # noqa: F401 (adds its command)
from loram_hub import AutoLoramModel, mask_lora_, recover, recover_scaled
from loram_hub.adapter import check_adapter, mark_names, read_record
from loram_hub.architecture import architecture_of
from loram_hub.cli import main
from loram_hub.errors import IncompatibleError, InvalidRequestError, PlanMismatchError, VerificationError
from loram_hub.finetuning import FinetuneRecipe, FinetuneResult, check_finetune, finetune
from loram_hub.finetuning.callbacks import RecoverCallback, SealCallback
from loram_hub.finetuning.checkpoints import latest_checkpoint
from loram_hub.finetuning.preparing import prepare
from loram_hub.finetuning.processes import Processes
from loram_hub.finetuning.runs import RunFolder
from loram_hub.hub import METADATA_FILES
from loram_hub.masked_lora import is_masked
from loram_hub.plan import Plan
from loram_hub.recipes import section_from
from loram_hub.release import open_metadata
from loram_hub.seals import seal

WEIGHTS = "adapter_model.safetensors"
STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its NF4 release without half of the weights, another such release, and tasks."""
    folder = tmp_path_factory.mktemp("sparse")
    save_sparse_release(folder / "release")
    sparse_release(folder / "other", folder / "release-base", pattern="2:8")
    tasks = [{"prompt": f"w{n % 40 + 4} w{n % 31 + 9}", "completion": f" w{n % 20 + 5}"} for n in range(24)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return folder


def recipe(folder: Path, *, release: str | None = None, masked: bool | None = True, **changes: Any) -> FinetuneRecipe:
    values = {
        "release": str(folder / "release") if release is None else release,
        "dtype": "float32",  # on all machines alike
        "seed": 3,
        "data": {"train": [{"source": str(folder / "tasks.jsonl")}]},
        "lora": {"masked": masked},
        "training": {"steps": STEPS, "batch_size": 4, "micro_batch": 2, "max_tokens": 16},
        "checkpoints": {"every": 2},
    }
    return section_from(FinetuneRecipe, values | changes)


@pytest.fixture(scope="module")
def run(folder: Path) -> FinetuneResult:
    """An undisturbed masked run."""
    return finetune(recipe(folder), folder / "run")


def test_recovery_copies_the_factors_and_names_the_base(folder: Path, run: FinetuneResult) -> None:
    trained, recovered = load_file(run.adapter / WEIGHTS), load_file(run.recovered / WEIGHTS)

    assert trained.keys() == recovered.keys()
    assert all(trained[name].tobytes() == recovered[name].tobytes() for name in trained)
    assert check_adapter(run.recovered, architecture=architecture_of(sparse_config())).base_id == "org/base"
    base = AutoModelForCausalLM.from_pretrained(folder / "release-base", dtype=torch.float32)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, str(run.recovered))(ids).logits
    assert float((after - before).abs().max()) > 0


def test_an_adapter_of_a_sparse_release_is_not_marked_since_it_has_full_size(run: FinetuneResult) -> None:
    assert mark_names(load_file(run.adapter / WEIGHTS)) == []


def test_how_it_was_trained_is_written_down(folder: Path, run: FinetuneResult) -> None:
    plan = open_metadata(folder / "release").plan.digest

    assert json.loads((run.adapter / "loram.json").read_text()) == {"masked": True, "plan_sha256": plan}
    assert read_record(run.recovered).trained["masked"] is True
    assert json.loads((run.folder / "finetune.json").read_text())["masked"] is True
    assert "masked" not in json.loads((run.adapter / "adapter_config.json").read_text())
    assert read_record(run.folder / "checkpoints" / "recovered-2").trained["masked"] is True


def test_a_record_that_says_something_else_of_masks_is_refused(run: FinetuneResult, tmp_path: Path) -> None:
    shutil.copytree(run.recovered, tmp_path / "adapter")
    record = tmp_path / "adapter" / "loram.json"
    values = json.loads(record.read_text())
    values["trained"]["masked"] = False
    del values["sha256"]
    record.write_text(seal(values))

    with pytest.raises(VerificationError, match=r"trained\.masked .* is False; true, or no such field, is needed"):
        read_record(tmp_path / "adapter")


def test_unmasked_training_gives_another_adapter_and_is_another_run(
    folder: Path, run: FinetuneResult, tmp_path: Path
) -> None:
    unmasked = finetune(recipe(folder, masked=False), tmp_path / "run")

    assert (unmasked.adapter / WEIGHTS).read_bytes() != (run.adapter / WEIGHTS).read_bytes()
    assert "masked" not in read_record(unmasked.recovered).trained
    assert json.loads((unmasked.adapter / "loram.json").read_text()).keys() == {"plan_sha256"}
    assert mark_names(load_file(unmasked.adapter / WEIGHTS)) == []
    with pytest.raises(InvalidRequestError, match=r"lora\.masked was False and is True"):
        check_finetune(recipe(folder), tmp_path / "run")
    by_default = recipe(folder, masked=None)
    assert check_finetune(by_default, tmp_path / "run").is_finished


def test_a_dry_run_says_whether_the_update_is_masked_which_it_is_not_by_default(folder: Path, tmp_path: Path) -> None:
    for masked, expected in ((True, True), (False, False), (None, False)):
        assert check_finetune(recipe(folder, masked=masked), tmp_path / "run").to_dict()["masked"] is expected


# PEFT asks the Hub for the base's config when it saves, to see whether the vocabulary was resized.
@pytest.mark.filterwarnings("ignore:Could not find a config file in alice/sparse:UserWarning")
def test_a_release_from_the_hub_is_trained_on_masked(folder: Path, run: FinetuneResult, tmp_path: Path) -> None:
    commit, repository = "0123456789" * 4, Path(constants.HF_HUB_CACHE) / "models--alice--sparse"
    shutil.copytree(folder / "release", repository / "snapshots" / commit)  # as if it had been downloaded
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)

    done = finetune(recipe(folder, release="alice/sparse"), tmp_path / "run")

    assert (done.recovered / WEIGHTS).read_bytes() == (run.recovered / WEIGHTS).read_bytes()
    record = read_record(done.recovered)
    assert (record.release_id, record.release_commit) == ("alice/sparse", commit)


def test_masks_are_refused_where_there_are_none(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(layers=2)
    save_metadata_release(tmp_path / "structured", config, Plan(architecture_of(config), {}))

    with pytest.raises(InvalidRequestError, match=r"lora\.masked is true, and structured is a structured release"):
        check_finetune(recipe(folder, release=str(tmp_path / "structured")), tmp_path / "run")


def test_masks_and_fsdp_are_refused_together(folder: Path, tmp_path: Path) -> None:
    two = Processes(rank=0, size=2, local_rank=0, device="cuda:0")
    asked = recipe(folder, distributed={"sharding": "fsdp"})

    with pytest.raises(IncompatibleError, match=r"lora\.masked is true and distributed\.sharding is fsdp"):
        prepare(asked, RunFolder(tmp_path / "run"), two, token=None)


def test_an_adapter_goes_back_to_its_own_release_alone(folder: Path, run: FinetuneResult, tmp_path: Path) -> None:
    with pytest.raises(PlanMismatchError, match="was trained on plan"):
        recover(run.adapter, tmp_path / "out", release=folder / "other")

    shutil.copytree(run.adapter, tmp_path / "adapter")  # as PEFT saves it, without a record
    (tmp_path / "adapter" / "loram.json").unlink()
    recover(tmp_path / "adapter", tmp_path / "recovered")
    assert (tmp_path / "recovered" / WEIGHTS).read_bytes() == (run.recovered / WEIGHTS).read_bytes()


def test_an_unnamed_revision_of_a_sparse_release_makes_no_difference(
    folder: Path, run: FinetuneResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit, repository = "9876543210" * 4, Path(constants.HF_HUB_CACHE) / "models--alice--metadata"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in METADATA_FILES:
        shutil.copy(folder / "release" / name, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(run.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "loram.json").unlink()
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "alice/metadata"}))

    recovered = recover(tmp_path / "adapter", tmp_path / "out")

    assert (recovered.assumed, recovered.release_commit) == (True, commit)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (run.recovered / WEIGHTS).read_bytes()


def test_the_command_recovers_and_says_for_which_model(run: FinetuneResult, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["recover", str(run.adapter), str(tmp_path / "out"), "--json"])

    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["base_id"] == "org/base"


def test_a_scale_is_chosen_for_a_masked_adapter_as_for_any(folder: Path, run: FinetuneResult, tmp_path: Path) -> None:
    tasks = [{"prompt": f"w{n + 4} w{n + 9}", "completion": f" w{n + 5}"} for n in range(32)]

    scaled = recover_scaled(
        run.adapter, tmp_path / "out", data=tasks, base=folder / "release-base", compute_dtype=torch.float32
    )  # fmt: skip

    assert 1.0 in dict(scaled.scale.losses)
    assert read_record(scaled.adapter.folder).trained["masked"] is True


def plain_lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")


def test_stock_trainers_take_a_masked_model_or_have_theirs_masked(folder: Path, tmp_path: Path) -> None:
    own = tiny_trainer(folder / "release", tmp_path / "own", lora=plain_lora(), max_steps=3)
    mask_lora_(own.model)  # type: ignore[arg-type]  # a PeftModel

    set_seed(own.args.seed)  # as the trainer does before it makes an adapter
    given = get_peft_model(AutoLoramModel.from_pretrained(folder / "release", dtype=torch.float32), plain_lora())
    mask_lora_(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames what PEFT and TRL still use
        other = SFTTrainer(
            model=given,
            args=replace(own.args, output_dir=str(tmp_path / "given")),
            train_dataset=examples(14),
            processing_class=AutoTokenizer.from_pretrained(folder / "release"),
            callbacks=[RecoverCallback(), SealCallback()],
        )
    own.train()
    other.train()

    assert is_masked(other.model)
    for path in (f"checkpoint-3/{WEIGHTS}", f"recovered-3/{WEIGHTS}", "recovered-3/loram.json"):
        assert (tmp_path / "own" / path).read_bytes() == (tmp_path / "given" / path).read_bytes()
    assert read_record(tmp_path / "given" / "recovered-3").trained["masked"] is True


@pytest.mark.parametrize("was", [True, False], ids=["was masked", "was not"])
def test_a_run_does_not_change_its_mind_about_masks(folder: Path, tmp_path: Path, was: bool) -> None:
    first = tiny_trainer(folder / "release", tmp_path / "run", lora=plain_lora(), max_steps=2)
    if was:
        mask_lora_(first.model)  # type: ignore[arg-type]  # a PeftModel
    first.train()

    again = tiny_trainer(folder / "release", tmp_path / "run", lora=plain_lora(), max_steps=4)
    if not was:
        mask_lora_(again.model)  # type: ignore[arg-type]  # a PeftModel
    last = latest_checkpoint(tmp_path / "run")
    assert last is not None
    with pytest.raises(InvalidRequestError, match="was trained masked" if was else "was trained unmasked"):
        again.train(resume_from_checkpoint=str(last.folder))
    assert latest_checkpoint(tmp_path / "run") == last


def test_the_live_model_is_recovered_as_what_it_saves(folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoLoramModel.from_pretrained(folder / "release", dtype=torch.float32), plain_lora())
    assert isinstance(model, PeftModel)
    mask_lora_(model)

    recovered = recover(model, tmp_path / "out")

    assert read_record(recovered.folder).trained["masked"] is True
    assert not recovered.assumed
