"""The command as people and scripts meet it: a real process, its output, its exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from builders import (
    half_plan,
    random_factors,
    save_adapter,
    save_base,
    save_metadata_release,
    save_tokenizer,
    tiny_architecture,
    tiny_config,
)

from loram_hub.cli import main

EXPECTED_OPTIONS = {
    "plan": {
        "pruning-ratio", "keep-first", "keep-last", "round-to", "sparsity", "pattern", "revision", "token", "json",
    },
    "prune": {
        "method", "pruning-ratio", "keep-first", "keep-last", "round-to", "importance", "importance-out", "sparsity",
        "pattern", "calibration", "samples", "tokens", "seed", "quantize", "device", "overwrite", "dry-run", "revision",
        "token", "json",
    },
    "quantize": {"device", "overwrite", "dry-run", "revision", "token", "json"},
    "card": {"repo-id", "license", "evaluation", "dry-run", "json"},
    "push": {
        "private", "gated", "license", "evaluation", "tag", "collection", "message", "overwrite", "token", "dry-run",
        "json",
    },
    "align": {
        "corpus", "steps", "batch-size", "micro-batch-size", "sequence-length", "held-out", "seed", "learning-rate",
        "warmup-steps", "precision", "optimizer", "trainable", "teacher", "distillation", "activation-checkpointing",
        "compile", "processes", "evaluate-every", "save-every", "report-to", "settings", "run-dir", "resume", "device",
        "overwrite", "dry-run", "revision", "token", "json",
    },
    "teach": {
        "corpus", "steps", "batch-size", "sequence-length", "held-out", "seed", "k", "block-sequences", "settings",
        "device", "overwrite", "dry-run", "revision", "token", "json",
    },
    "refit": {
        "calibration", "base", "target", "ridge", "samples", "tokens", "seed", "device", "overwrite", "dry-run",
        "revision", "token", "json",
    },
    "publish": {
        "repo-id", "work-dir", "launcher", "until", "keep-intermediate", "ignore-versions", "token", "dry-run", "json",
    },
    "config-schema": set(),
    "info": {"revision", "token", "json"},
    "verify": {"full", "base", "revision", "token", "json"},
    "estimate": {
        "gpu", "seq", "micro-batch", "rank", "targets", "masked-lora", "dropout", "optim", "checkpointing",
        "processes", "embedding", "lm-head", "offload-activations", "pruning-ratio", "keep-first", "keep-last",
        "round-to", "16-bit", "picture", "revision", "token", "json",
    },
    "finetune": {"out", "resume", "token", "dry-run", "json"},
    "recover": {
        "release", "dtype", "calibrate-scale", "base", "device", "overwrite", "dry-run", "revision", "token", "json",
    },
    "doctor": {"target", "base", "fix", "overwrite", "revision", "token", "json"},
    "merge": {"allow-base-mismatch", "overwrite", "dry-run", "revision", "token", "json"},
    "eval": {
        "base", "release", "adapter", "recovered", "max-tokens", "protocol", "tasks", "task-folder", "num-fewshot",
        "as", "run-generated-code", "batch-size", "limit", "device", "o", "out", "dry-run", "allow-base-mismatch",
        "json",
    },
    "demo": {"model", "work-dir", "pruning-ratio", "steps", "device", "json"},
    "study": {"work-dir", "o", "out", "profile", "seed", "only", "keep-releases", "token", "dry-run", "json"},
    "report": {
        "o", "out", "base", "compare", "importance", "evaluation", "pictures", "title", "overwrite", "dry-run", "token",
        "json",
    },
}  # fmt: skip
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
STRUCTURE = ("--pruning-ratio", "0.6", "--keep-first", "1", "--keep-last", "1")


def loram(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loram_hub", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )


def output(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "base"
    return save_tokenizer(save_base(folder, tiny_config(layers=3), dtype="bfloat16"))


def test_options_do_not_grow_unnoticed() -> None:
    found = {
        name: {option.lstrip("-") for p in command.params if isinstance(p, click.Option) for option in p.opts}
        for name, command in main.commands.items()
    }

    assert found == EXPECTED_OPTIONS


@pytest.mark.parametrize("command", EXPECTED_OPTIONS)
def test_every_command_helps_with_an_example(command: str) -> None:
    text = main.commands[command].get_help(click.Context(main.commands[command], info_name=command))

    assert f"Example: loram {command}" in text


def test_plan_prints_the_papers_counts_from_a_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))

    found = output(loram("plan", tmp_path, "--pruning-ratio", "0.85", "--json"))

    assert found["original_parameters"] == 70_553_706_496
    assert found["pruned_parameters"] == 17_849_982_976
    assert found["reduction"] == pytest.approx(3.9526, abs=1e-4)
    assert found["paper_reduction"] == pytest.approx(15.81, abs=5e-3)
    assert found["bf16_bytes"] == 2 * 17_849_982_976
    assert found["paper_nf4_gib"] == pytest.approx(8.31, abs=5e-3)
    assert found["nf4_bytes"] / 2**30 == pytest.approx(11.48, abs=5e-3)
    assert found["kept"][3] == {"layer": 3, "kv_heads": 8, "channels": 28672}
    assert found["kept"][4] == {"layer": 4, "kv_heads": 2, "channels": 4300}
    assert len(found["kept"]) == 80


def test_plan_takes_a_config_file_too_and_speaks_to_people(tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text(json.dumps(LLAMA_70B))

    run = loram("plan", tmp_path / "some.json")

    assert run.returncode == 0
    assert "17,849,982,976" in run.stdout
    assert "layers 4-77: 2 KV heads, 4,300 MLP channels" in run.stdout
    assert "Next: loram prune" in run.stderr


def test_prune_quantize_info_verify_recover_and_merge_go_hand_in_hand(base: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from loram_hub import AutoLoramModel

    dry = output(loram("prune", base, tmp_path / "pruned", "--importance", "random", *STRUCTURE, "--dry-run", "--json"))
    assert not (tmp_path / "pruned").exists()
    pruned = output(loram("prune", base, tmp_path / "pruned", "--importance", "random", *STRUCTURE, "--json"))
    assert pruned["pruned_parameters"] == dry["pruned_parameters"]

    planned = output(loram("quantize", tmp_path / "pruned", tmp_path / "nf4", "--dry-run", "--json"))
    quantized = output(loram("quantize", tmp_path / "pruned", tmp_path / "nf4", "--json"))
    assert quantized["nf4_bytes"] == planned["nf4_bytes"]
    assert output(loram("info", tmp_path / "nf4", "--json"))["quantization"]["type"] == "nf4"
    assert output(loram("verify", tmp_path / "nf4", "--json"))["intact"] is True

    torch.manual_seed(0)
    tuned = get_peft_model(
        AutoLoramModel.from_pretrained(tmp_path / "nf4", dtype=torch.float32),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    tuned.save_pretrained(str(tmp_path / "trained"))
    recovered = output(loram("recover", tmp_path / "trained", tmp_path / "recovered", "--json"))
    assert recovered["base_id"] == "base"
    assert len(recovered["modules"]) == 21

    merged = output(loram("merge", base, tmp_path / "recovered", tmp_path / "merged", "--json"))
    assert merged["merged"] == 21

    (tmp_path / "held_out.jsonl").write_text(json.dumps({"prompt": "w5 w6", "completion": " w7"}) + "\n")
    table = output(
        loram(
            "eval", tmp_path / "held_out.jsonl", "--base", base, "--release", tmp_path / "nf4",
            "--adapter", tmp_path / "trained", "--recovered", tmp_path / "recovered", "--json",
        )
    )  # fmt: skip
    assert [row["model"] for row in table["rows"]] == ["base", "pruned", "pruned + adapter", "base + recovered adapter"]


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["plan", "{base}", "--pruning-ratio", "1"], 2, "pruning_ratio"),
        (["plan", "{base}", "--no-such-option"], 2, "No such option"),
        (["prune", "{base}", "{out}", "--importance", "nonsense"], 2, "Importance"),
        (["prune", "{base}", "{out}", "--keep-first", "1", "--keep-last", "1"], 2, "calibration"),
        (["prune", "{empty}", "{out}"], 3, "no config.json"),
        (["info", "{base}"], 3, "no LoRAM release"),
        (["verify", "{altered}"], 3, "config.json"),
        (["prune", "{base}", "{out}", "--importance", "nonsense", "--dry-run"], 2, "Importance"),
        (["prune", "{base}", "{base}", "--importance", "random", "--overwrite"], 2, "overlap"),
        (["plan", "{foreign}"], 4, "mixtral"),
        (["plan", "org/some-model"], 5, "org/some-model"),
    ],
)
def test_errors_are_one_message_and_the_right_exit_code(
    base: Path, tmp_path: Path, arguments: list[str], code: int, match: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text(json.dumps({**LLAMA_70B, "model_type": "mixtral"}))
    if "{altered}" in arguments:
        assert loram("prune", base, tmp_path / "altered", "--importance", "random", *STRUCTURE).returncode == 0
        (tmp_path / "altered" / "config.json").write_text("{}")
    names = {"base": base, **{name: tmp_path / name for name in ("empty", "foreign", "altered", "out")}}

    run = loram(*(argument.format(**names) for argument in arguments))

    assert run.returncode == code, run.stderr
    assert match in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert not (tmp_path / "out").exists()


def test_errors_are_json_when_asked_for_json(tmp_path: Path) -> None:
    run = loram("info", tmp_path, "--json")

    error = json.loads(run.stdout)["error"]
    assert run.returncode == error["code"] == 3
    assert error["kind"] == "CheckpointError"
    assert "config.json" in error["message"]


def test_the_light_commands_do_not_import_torch(base: Path, tmp_path: Path) -> None:
    run = loram("prune", base, tmp_path / "r", "--importance", "random", *STRUCTURE)
    assert run.returncode == 0, run.stderr
    code = (
        "import sys\nfrom loram_hub.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy imports'\n"
    )
    for arguments in (
        ["plan", str(base), "--keep-first", "1", "--keep-last", "1"],
        ["info", str(tmp_path / "r")],
        ["verify", str(tmp_path / "r")],
    ):
        found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr


def test_the_console_script_is_the_same_command() -> None:
    script = shutil.which("loram", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("loram-hub is not installed in this environment")

    run = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)

    assert run.returncode == 0
    assert "loram" in run.stdout


def test_doctor_says_what_a_server_does_wrong_and_fixes_it(tmp_path: Path) -> None:
    shapes = {"model.layers.0.self_attn.q_proj": (60, 24), "model.layers.0.self_attn.v_proj": (30, 24)}
    save_adapter(tmp_path / "adapter", random_factors(shapes), base="org/base", alpha_pattern={"v_proj": 32})

    ill = loram("doctor", tmp_path / "adapter", "--target", "vllm")
    assert ill.returncode == 4
    assert "alpha_pattern" in ill.stdout
    assert "vllm: wrong results" in ill.stdout
    assert "--fix=OUT" in ill.stderr

    cured = output(loram("doctor", tmp_path / "adapter", "--fix", tmp_path / "fixed", "--json"))
    assert cured["verdict"] == "serves"
    assert cured["fixed"]["changes"]
    assert cured["command"] == [
        f"vllm serve org/base --enable-lora --max-lora-rank 8 --lora-modules fixed={tmp_path / 'fixed'}"
    ]


def test_card_is_printed_or_written(tmp_path: Path) -> None:
    plan = half_plan(tiny_architecture())
    release = save_metadata_release(tmp_path / "release", tiny_config(), plan, base_id="org/base")

    dry = output(loram("card", release, "--license", "mit", "--repo-id", "org/tiny", "--dry-run", "--json"))
    assert dry["card"].startswith("---\nbase_model: org/base\n")
    assert not (release / "README.md").exists()
    written = output(loram("card", release, "--license", "mit", "--repo-id", "org/tiny", "--json"))
    assert written["files"] == dry["files"]
    assert (release / "README.md").read_text() == dry["card"]
    assert loram("card", release).returncode == 2  # nobody knows the licence of org/base
