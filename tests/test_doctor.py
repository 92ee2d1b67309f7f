"""What the doctor says of an adapter, held against what PEFT does; and that its fix changes form, not results."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from builders import (
    SEVEN,
    half_plan,
    projections,
    random_factors,
    save_adapter,
    save_base,
    save_metadata_release,
    tiny_architecture,
    tiny_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from loram_hub import recover
from loram_hub.adapter import MARK, check_adapter, read_adapter
from loram_hub.doctor import RULES, TARGETS, Diagnosis, Target, examine, fix
from loram_hub.errors import (
    CheckpointError,
    InvalidRequestError,
    PlanMismatchError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.plan import Plan

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ARCHITECTURE = tiny_architecture()
WHOLE = projections(Plan(ARCHITECTURE, {}))
HEAD = {"lm_head": (53, 24)}
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model."""
    return save_base(tmp_path_factory.mktemp("base") / "base", tiny_config())


def sound(folder: Path, **changes: Any) -> Path:
    """Write an adapter that every server takes."""
    tensors = small(random_factors(WHOLE))
    return save_adapter(folder, tensors, **({"targets": list(SEVEN), "base": "org/base", "revision": COMMIT} | changes))


def small(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Scale factors down so that a tiny model's logits stay in a range where rounding is small."""
    return {name: (0.1 * value).astype(value.dtype) for name, value in tensors.items()}


def rules(diagnosis: Diagnosis) -> dict[str, str]:
    """Severity by name of the rule."""
    return {finding.rule: finding.severity for finding in diagnosis.findings}


@pytest.mark.parametrize("target", TARGETS)
def test_a_sound_adapter_has_no_findings(tmp_path: Path, base: Path, target: Target) -> None:
    folder = sound(tmp_path / "adapter")
    diagnosis = examine(folder, target, base=base)

    assert (diagnosis.verdict, diagnosis.findings, diagnosis.not_checked) == ("serves", (), ())
    assert (diagnosis.rank, diagnosis.is_fixable) == (4, False)
    assert diagnosis.base == str(base)


def test_the_commands_are_exact(tmp_path: Path, base: Path) -> None:
    folder = sound(tmp_path / "my adapter", r=12, rank_pattern={})
    save_adapter(folder, random_factors(WHOLE, rank=12), targets=list(SEVEN), base="org/base", revision=COMMIT, r=12)
    commands = {target: examine(folder, target).command for target in TARGETS}
    path = shlex.quote(str(folder))

    assert commands == {
        "vllm": (
            f"vllm serve org/base --revision {COMMIT} --enable-lora --max-lora-rank 16 "
            f"--lora-modules {shlex.quote(f'my-adapter={folder}')}",
        ),
        "sglang": (
            f"python -m sglang.launch_server --model-path org/base --revision {COMMIT} --enable-lora "
            f"--lora-paths {shlex.quote(f'my-adapter={folder}')} --max-lora-rank 12",
        ),
        "llamacpp": (
            "python convert_hf_to_gguf.py org/base --remote --outfile base.gguf",
            f"python convert_lora_to_gguf.py --base-model-id org/base {path} --outfile adapter.gguf",
            "llama-server -m base.gguf --lora adapter.gguf",
        ),
        "peft": (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained('org/base', revision='{COMMIT}')",
            f"model = PeftModel.from_pretrained(base, {str(folder)!r})",
        ),
    }
    local = examine(folder, "llamacpp", base=base).command
    assert local is not None
    assert local[1] == f"python convert_lora_to_gguf.py --base {base} {path} --outfile adapter.gguf"


def test_the_lines_for_peft_run(tmp_path: Path, base: Path) -> None:
    command = examine(sound(tmp_path / "adapter"), "peft", base=base).command
    assert command is not None

    names: dict[str, Any] = {}
    exec("\n".join(command), names)  # the lines that a user pastes
    assert names["model"].active_adapters == ["default"]


# Each kind of problem, and its rule.


def edit_config(**changes: Any) -> Callable[[Path], None]:
    """Return an alteration of the config; None takes a setting away."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit


def edit_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return an alteration of the tensors."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def put(name: str, value: Any) -> Callable[[Path], None]:
    """Return an alteration that puts one tensor in place."""
    return edit_tensors(lambda tensors: tensors.update({f"{PREFIX}{name}": value}))


def drop(*names: str) -> Callable[[Path], None]:
    """Return an alteration that takes tensors away."""
    return edit_tensors(lambda tensors: [tensors.pop(f"{PREFIX}{name}") for name in names])


def move(old: str, new: str) -> Callable[[Path], None]:
    """Return an alteration that renames the tensors of a module."""

    def rename(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(f"{PREFIX}{old}.")]:
            tensors[name.replace(f"{PREFIX}{old}", new)] = tensors.pop(name)

    return edit_tensors(rename)


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Return an alteration that writes a file."""
    data = content if isinstance(content, bytes) else content.encode()

    def edit(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return edit


def pickled(folder: Path) -> None:
    """Put a pickle in place of the weights."""
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"not opened")


def pruned(folder: Path) -> None:
    """Cut the factors as a release's plan does."""
    save_file(small(random_factors(projections(half_plan(ARCHITECTURE)))), folder / WEIGHTS)


def in_turn(*alterations: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return several alterations as one."""

    def edit(folder: Path) -> None:
        for alteration in alterations:
            alteration(folder)

    return edit


def of_rank(rank: int) -> Callable[[Path], None]:
    """Return an alteration that gives all modules another rank."""

    def edit(folder: Path) -> None:
        save_file(random_factors(WHOLE, rank=rank), folder / WEIGHTS)
        edit_config(r=rank)(folder)

    return edit


def ranked(folder: Path) -> None:
    """Give two kinds of modules ranks of their own."""
    ranks = {module: 9 if module.endswith("q_proj") else 2 if module.endswith("o_proj") else 4 for module in WHOLE}
    save_file(small(random_factors(WHOLE, rank=ranks)), folder / WEIGHTS)
    edit_config(rank_pattern={"q_proj": 9, "o_proj": 2})(folder)


def with_head(folder: Path) -> None:
    """Adapt the lm_head too."""
    save_file(small(random_factors(WHOLE | HEAD)), folder / WEIGHTS)
    edit_config(target_modules=[*SEVEN, "lm_head"])(folder)


def copied_head(folder: Path) -> None:
    """Adapt the lm_head, with a copy of the frozen weight, as PEFT saves it."""
    with_head(folder)
    put("lm_head.base_layer.weight", np.zeros((53, 24), np.float32))(folder)


NAN = np.full((4, 24), np.nan, np.float32)
VECTOR = np.ones(37, np.float32)
CASES: list[tuple[str, Callable[[Path], None], Mapping[Any, str]]] = [
    ("config-missing", lambda folder: (folder / CONFIG).unlink(), dict.fromkeys(TARGETS, "refused")),
    ("config-missing", write(CONFIG, "{"), dict.fromkeys(TARGETS, "refused")),
    ("config-not-strict", write(CONFIG, '{"r": 4, "r": 8}'), dict.fromkeys(TARGETS, "wrong results")),
    ("weights-missing", lambda folder: (folder / WEIGHTS).unlink(), dict.fromkeys(TARGETS, "refused")),
    ("weights-missing", write(WEIGHTS, b"\x00" * 20), dict.fromkeys(TARGETS, "refused")),
    ("pickle", pickled, dict.fromkeys(TARGETS, "warning")),
    ("no-factors", edit_tensors(dict.clear), dict.fromkeys(TARGETS, "wrong results")),
    ("not-lora", edit_config(peft_type="IA3"), {"vllm": "refused", "sglang": "refused", "llamacpp": "refused"}),
    (
        "rank-or-alpha-missing",
        edit_config(lora_alpha=None),
        dict.fromkeys(TARGETS, "refused") | {"peft": "wrong results"},
    ),
    ("rank-or-alpha-missing", edit_config(r=-4), dict.fromkeys(TARGETS, "refused") | {"peft": "wrong results"}),
    ("dora", edit_config(use_dora=True), {"vllm": "refused", "sglang": "refused", "llamacpp": "refused"}),
    (
        "modules-to-save",
        edit_config(modules_to_save=["lm_head"]),
        {"vllm": "refused", "sglang": "wrong results", "llamacpp": "refused"},
    ),
    ("bias", edit_config(bias="all"), {"vllm": "refused", "sglang": "wrong results", "llamacpp": "refused"}),
    ("bias", edit_config(lora_bias=True), {"vllm": "refused", "sglang": "wrong results", "llamacpp": "refused"}),
    (
        "changed-base",
        edit_config(init_lora_weights="pissa"),
        {"vllm": "refused", "sglang": "wrong results", "llamacpp": "wrong results", "peft": "warning"},
    ),
    (
        "lora-ga",
        edit_config(init_lora_weights="lora_ga"),
        dict.fromkeys(TARGETS, "wrong results"),
    ),
    *[
        ("settings-unreadable", edit_config(**{key: value}), dict.fromkeys(TARGETS, "refused"))
        for key, values in {
            "lora_alpha": ("x", 0, -8),
            "target_modules": (5, [1, 2], {"a": 1}, "(", ".*" * 12 + "z"),
            "rank_pattern": ([1], {"(": 1}, {"[^x]*" * 12 + "x": 4}),
            "alpha_pattern": (5,),
            "base_model_name_or_path": (5, "x" * 5_000, "a\0b"),
            "revision": (5,),
        }.items()
        for value in values
    ],
    (
        "variant",
        edit_config(layer_replication=[[0, 2]]),
        {"vllm": "refused", "sglang": "wrong results", "llamacpp": "wrong results"},
    ),
    ("activated-lora", edit_config(alora_invocation_tokens=[1]), {"vllm": "refused", "sglang": "wrong results"}),
    (
        "unread-variant",
        edit_config(target_parameters=["x"]),
        {"vllm": "wrong results", "sglang": "wrong results", "llamacpp": "wrong results"},
    ),
    ("rank-pattern", ranked, {"vllm": "wrong results", "sglang": "refused"}),
    (
        "alpha-pattern",
        edit_config(alpha_pattern={"q_proj": 32}),
        {"vllm": "wrong results", "sglang": "wrong results", "llamacpp": "wrong results"},
    ),
    (
        "ambiguous-alpha",
        edit_config(alpha_pattern={"q_proj": 32, "layers.1.*": 2}),
        dict.fromkeys(TARGETS, "wrong results"),
    ),
    ("rslora", edit_config(use_rslora=True), {"sglang": "wrong results", "llamacpp": "wrong results"}),
    ("rank-too-large", of_rank(520), {"vllm": "refused"}),
    (
        "foreign-tensor",
        put(f"{UP}.lora_magnitude_vector", VECTOR),
        {"vllm": "refused", "sglang": "wrong results", "llamacpp": "refused", "peft": "warning"},
    ),
    ("frozen-copy", copied_head, dict.fromkeys(TARGETS, "warning")),
    ("no-prefix", move(UP, UP), {"peft": "wrong results"}),
    (
        "half-pair",
        drop(f"{UP}.lora_B.weight"),
        {"vllm": "refused", "sglang": "wrong results", "llamacpp": "refused", "peft": "wrong results"},
    ),
    (
        "rank-mismatch",
        edit_config(r=2),
        {"vllm": "wrong results", "sglang": "refused", "llamacpp": "warning", "peft": "refused"},
    ),
    ("not-finite", put(f"{UP}.lora_A.weight", NAN), dict.fromkeys(TARGETS, "wrong results")),
    ("pruned", pruned, {"vllm": "wrong results", "sglang": "refused", "llamacpp": "refused", "peft": "refused"}),
    ("pruned-marked", in_turn(pruned, put(f"{UP}.{MARK}", np.zeros(32, np.uint8))), dict.fromkeys(TARGETS, "refused")),
    ("other-base", put(f"{UP}.lora_A.weight", np.ones((4, 25), np.float32)), dict.fromkeys(TARGETS, "refused")),
    (
        "unknown-module",
        move(UP, f"{PREFIX}model.layers.1.mlp.fc1"),
        {"vllm": "refused", "sglang": "refused", "llamacpp": "refused", "peft": "wrong results"},
    ),
    (
        "unknown-path",
        move(UP, f"{PREFIX}model.layers.9.mlp.up_proj"),
        {"vllm": "wrong results", "sglang": "refused", "llamacpp": "refused", "peft": "wrong results"},
    ),
    ("missing-factors", drop(f"{UP}.lora_A.weight", f"{UP}.lora_B.weight"), dict.fromkeys(TARGETS, "wrong results")),
    ("undeclared-factors", edit_config(target_modules=list(SEVEN[:6])), dict.fromkeys(TARGETS, "wrong results")),
    ("target-pattern", edit_config(target_modules=r".*_proj"), {"sglang": "refused"}),
    ("new-tokens", write("added_tokens.json", '{"<new>": 53, "<old>": 3}'), {"sglang": "refused"}),
    ("no-base", edit_config(base_model_name_or_path=None), dict.fromkeys(TARGETS, "warning")),
    ("local-base", edit_config(base_model_name_or_path="/home/me/model"), dict.fromkeys(TARGETS, "warning")),
    ("unpinned-base", edit_config(revision=None), dict.fromkeys(TARGETS, "warning")),
]
IDS = [f"{rule}-{number}" for number, (rule, _, _) in enumerate(CASES)]


@pytest.mark.parametrize(("rule", "alter", "expected"), CASES, ids=IDS)
def test_each_problem_is_found_where_it_matters(
    tmp_path: Path, base: Path, rule: str, alter: Callable[[Path], None], expected: Mapping[Any, str]
) -> None:
    folder = sound(tmp_path / "adapter")
    alter(folder)

    for target in TARGETS:
        diagnosis = examine(folder, target, base=base)
        assert rules(diagnosis).get(rule) == expected.get(target)
        if expected.get(target) in ("refused", "wrong results"):
            assert diagnosis.verdict in ("refused", "wrong results")
            assert diagnosis.command is None
        assert all(finding.what and finding.why and finding.source and finding.remedy for finding in diagnosis.findings)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "changes",
    [
        {"base_model_name_or_path": "--trust-remote-code"},
        {"base_model_name_or_path": "-x/y"},
        {"base_model_name_or_path": "org/x\x1b[2J\nrm -rf ~ #"},
        {"base_model_name_or_path": "org/\u202ex"},
        {"base_model_name_or_path": "/gone/model"},
        {"base_model_name_or_path": "~nobody-has-this-name/x"},
        {"base_model_name_or_path": "org/" + "x" * 2_000 + "!"},
        {"revision": "--trust-remote-code"},
        {"revision": "main\x1b[2J"},
        {"revision": "a b"},
    ],
)
def test_no_name_of_a_stranger_gets_into_a_command(tmp_path: Path, target: Target, changes: dict[str, str]) -> None:
    diagnosis = examine(sound(tmp_path / "adapter", **changes), target)

    assert diagnosis.verdict == "serves"
    assert diagnosis.command is None
    assert diagnosis.notes[-1].startswith("no command: the base")


def test_what_the_doctor_prints_moves_no_cursor(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from loram_hub.cli import main

    bad = "org/x\x1b[2J\nrm -rf ~ #\u202e"
    folder = sound(tmp_path / "adapter", base_model_name_or_path=bad, rank_pattern={"\x1b[2J(": 4}, bias="\x1b[2J")
    (folder / "added_tokens.json").write_text('{"\\u001b[2J": 99}')

    result = CliRunner().invoke(main, ["doctor", str(folder)])

    assert result.exit_code == 4
    assert all(char.isprintable() for char in result.output.replace("\n", ""))
    assert not [line for line in result.output.splitlines() if line.startswith("rm")]


def test_what_is_no_regular_file_is_neither_opened_nor_waited_for(tmp_path: Path) -> None:
    def as_folder(path: Path) -> None:
        path.mkdir()

    for number, make in enumerate((as_folder, os.mkfifo)):
        for name in (CONFIG, "loram.json", "added_tokens.json", WEIGHTS):
            folder = sound(tmp_path / f"{number}-{name}")
            (folder / name).unlink(missing_ok=True)
            make(folder / name)
            verdict = "serves" if name in ("loram.json", "added_tokens.json") else "refused"
            assert examine(folder, "vllm").verdict == verdict


def test_an_unsound_config_of_the_base_is_no_failure_of_the_doctor(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for config in (tiny_config(hidden_size="x"), tiny_config() | {"model_type": []}):
        (base / "config.json").write_text(json.dumps(config))
        for folder in (sound(tmp_path / "named", base=base), sound(tmp_path / "given")):
            diagnosis = examine(folder, "vllm", base=base if folder.name == "given" else None)
            assert [gap.partition(":")[0] for gap in diagnosis.not_checked] == ["shapes and targets"]
    (base / "config.json").write_text(json.dumps(tiny_config(hidden_size="x")))
    with pytest.raises(VerificationError, match="config of the base"):
        fix(sound(tmp_path / "adapter", base=base), tmp_path / "out")


def test_all_linear_as_text_means_the_same_to_doctor_and_fix(tmp_path: Path, base: Path) -> None:
    folder = sound(tmp_path / "adapter", targets="all-linear", merge_weights=True)

    assert examine(folder, "vllm", base=base).verdict == "serves"
    assert check_adapter(folder, architecture=ARCHITECTURE).rank == 4
    fix(folder, tmp_path / "out", base=base)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"] == sorted(SEVEN)
    drop(f"{UP}.lora_A.weight", f"{UP}.lora_B.weight")(folder)
    assert rules(examine(folder, "vllm", base=base)) == {"missing-factors": "wrong results"}


def test_nan_in_the_last_rows_of_a_large_tensor_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loram_hub.doctor.evidence._PIECE", 100)
    folder = sound(tmp_path / "adapter")
    values = np.zeros((37, 4), np.float32)
    assert "not-finite" not in rules(examine(folder, "vllm"))
    values[36, 3] = np.nan
    put(f"{UP}.lora_B.weight", values)(folder)

    assert rules(examine(folder, "vllm"))["not-finite"] == "wrong results"


def test_problems_of_the_lm_head_depend_on_the_base(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", random_factors({"lm_head": (300_000, 24)}, rank=1), r=1)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(tiny_config(vocab_size=300_000, tie_word_embeddings=True)))

    assert rules(examine(folder, "vllm", base=base))["large-vocabulary"] == "refused"
    assert rules(examine(folder, "llamacpp", base=base))["tied-head"] == "refused"
    assert "tied-head" not in rules(examine(folder, "vllm", base=base))


def test_every_rule_has_a_case() -> None:
    tested = {rule for rule, _, _ in CASES} | {"large-vocabulary", "tied-head"}

    assert {rule.name for rule in RULES} == tested
    assert len({rule.name for rule in RULES}) == len(RULES)


# What the rules say of PEFT is what PEFT does.


def logits(base: Path, adapter: Path) -> Any:
    """Return what the base computes with an adapter, under stock PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT warns of missing keys and of unknown settings; the logits are the point
        adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
        return adapted(torch.arange(2, 18).reshape(2, 8)).logits.numpy()


PEFT_CASES = [
    (rule, alter, expected)
    for rule, alter, expected in CASES
    if rule
    in (
        "config-missing", "weights-missing", "rank-mismatch", "not-finite", "pruned", "pruned-marked", "other-base",
        "unknown-module", "unknown-path", "missing-factors", "undeclared-factors", "half-pair", "no-prefix",
        "foreign-tensor", "no-base", "unpinned-base", "target-pattern",
    )
]  # fmt: skip


@pytest.mark.parametrize(("rule", "alter", "expected"), PEFT_CASES)
def test_peft_does_what_the_rules_say(
    tmp_path: Path, base: Path, rule: str, alter: Callable[[Path], None], expected: Mapping[Any, str]
) -> None:
    right = logits(base, sound(tmp_path / "adapter"))
    alter(tmp_path / "adapter")
    try:
        found = logits(base, tmp_path / "adapter")
    except (RuntimeError, ValueError, OSError, SafetensorError):
        seen = "refused"
    else:
        seen = "right" if np.allclose(found, right, rtol=1e-5, atol=1e-6) else "wrong results"

    said = expected.get("peft", "right")
    assert seen == ("right" if said == "warning" else said)


def test_peft_loads_a_frozen_copy_over_the_weight_of_the_base(tmp_path: Path, base: Path) -> None:
    folder = sound(tmp_path / "adapter")
    with_head(folder)
    right = logits(base, folder)
    weight = load_file(base / "model.safetensors")["lm_head.weight"]

    put("lm_head.base_layer.weight", weight)(folder)
    np.testing.assert_allclose(logits(base, folder), right, rtol=1e-5, atol=1e-6)
    put("lm_head.base_layer.weight", 0 * weight)(folder)
    assert not np.allclose(logits(base, folder), right, rtol=0.1)


# The fix changes the form and not what is computed.


def as_one_scale(folder: Path) -> dict[str, Any]:
    """Read an adapter as a server does that knows one r and one alpha and applies them to all: B A times alpha / r."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    scale = config["lora_alpha"] / config["r"]
    modules = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    return {
        module.removeprefix(PREFIX): scale
        * (
            tensors[f"{module}.lora_B.weight"].astype(np.float64)
            @ tensors[f"{module}.lora_A.weight"].astype(np.float64)
        )
        for module in modules
    }


def meant(folder: Path) -> dict[str, Any]:
    """What the adapter means by PEFT's rules, read by the strict reader, whose scales are tested on their own."""
    return {
        module: pair.scale * (pair.lora_B.astype(np.float64) @ pair.lora_A.astype(np.float64))
        for module, pair in read_adapter(folder).pairs.items()
    }


def both(*alterations: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return one alteration after the other."""

    def edit(folder: Path) -> None:
        for alter in alterations:
            alter(folder)

    return edit


FIXABLE: list[tuple[str, Callable[[Path], None], bool]] = [
    ("rank_pattern", ranked, True),
    ("alpha_pattern", edit_config(alpha_pattern={"q_proj": 32, "down_proj": 3}), True),
    ("rslora", edit_config(use_rslora=True, lora_alpha=7), True),
    ("all of them", both(ranked, edit_config(use_rslora=True, alpha_pattern={"v_proj": 5})), True),
    ("lm_head copy", copied_head, False),
    ("regular expression", edit_config(target_modules=r".*_proj"), False),
    ("odd alpha", edit_config(lora_alpha=0.5), False),
    ("local base", edit_config(base_model_name_or_path="/home/me/model"), False),
]


@pytest.mark.parametrize(("kind", "alter", "was_wrong"), FIXABLE)
@pytest.mark.parametrize("with_base", [False, True])
def test_a_fixed_adapter_means_the_same_to_every_reader(
    tmp_path: Path, base: Path, kind: str, alter: Callable[[Path], None], was_wrong: bool, with_base: bool
) -> None:
    folder, out = sound(tmp_path / "adapter"), tmp_path / "out"
    alter(folder)
    if kind == "lm_head copy":  # the copy must be the base's own weight for PEFT to be right before
        put("lm_head.base_layer.weight", load_file(base / "model.safetensors")["lm_head.weight"])(folder)
    fixed = fix(folder, out, base=base if with_base else None)
    before, after = meant(folder), as_one_scale(out)

    assert fixed.changes
    assert set(before) == set(after)
    largest = max(np.abs(update).max() for update in before.values())
    naive = as_one_scale(folder)
    error = max(np.abs(naive[module] - before[module]).max() for module in before) / largest
    assert (error > 0.01) == was_wrong
    for module, update in before.items():
        np.testing.assert_allclose(after[module], update, rtol=1e-5, atol=1e-6 * largest)
    np.testing.assert_allclose(logits(base, out), logits(base, folder), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "alter", "was_wrong"), FIXABLE)
def test_a_fixed_adapter_passes_every_check_and_every_server(
    tmp_path: Path, base: Path, kind: str, alter: Callable[[Path], None], was_wrong: bool
) -> None:
    folder, out = sound(tmp_path / "adapter"), tmp_path / "out"
    alter(folder)
    before = [examine(folder, target, base=base) for target in TARGETS]
    fixed = fix(folder, out)

    assert any(diagnosis.is_fixable for diagnosis in before) or kind == "odd alpha"
    assert check_adapter(out, architecture=ARCHITECTURE).rank == fixed.rank
    for target in TARGETS:
        diagnosis = examine(out, target, base=base)
        assert diagnosis.verdict == "serves", diagnosis.findings
    config = json.loads((out / CONFIG).read_text())
    assert len(config) == 15
    assert "/home" not in (out / CONFIG).read_text()
    assert config["revision"] == COMMIT
    assert fixed.nbytes == (out / WEIGHTS).stat().st_size


def test_a_canonical_adapter_comes_out_as_it_went_in(tmp_path: Path, base: Path) -> None:
    plan = half_plan(ARCHITECTURE)
    release = save_metadata_release(tmp_path / "release", tiny_config(), plan)
    trained = save_adapter(tmp_path / "t", random_factors(projections(plan)), targets=list(SEVEN), base=release)
    recover(trained, tmp_path / "adapter")
    fixed = fix(tmp_path / "adapter", tmp_path / "out")

    assert fixed.changes == ()
    for name in (CONFIG, WEIGHTS, "loram.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    assert check_adapter(tmp_path / "out", architecture=ARCHITECTURE).kind == "recovered adapter"


def test_the_record_of_a_recovered_adapter_follows_its_new_files(tmp_path: Path) -> None:
    plan = half_plan(ARCHITECTURE)
    release = save_metadata_release(tmp_path / "release", tiny_config(), plan)
    trained = save_adapter(tmp_path / "t", random_factors(projections(plan)), targets=list(SEVEN), base=release)
    recover(trained, tmp_path / "adapter", dtype="float32")
    fixed = fix(tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")

    assert fixed.changes == ("type of the factors: bfloat16",)
    assert check_adapter(tmp_path / "out", architecture=ARCHITECTURE).kind == "recovered adapter"


def test_16_bit_factors_stay_so_where_nothing_is_rounded_and_become_float32_where_it_is(tmp_path: Path) -> None:
    for number, (dtype, alpha, expected) in enumerate(
        [
            (ml_dtypes.bfloat16, 16, "bfloat16"),
            (ml_dtypes.bfloat16, 3, "float32"),
            (np.float16, 8, "float32"),
            (np.float16, 4, "float32"),
        ]
    ):
        tensors = random_factors({UP: (37, 24), "lm_head": (53, 24)}, dtype=dtype)
        folder = save_adapter(tmp_path / f"in{number}", tensors, alpha_pattern={"lm_head": alpha})
        fixed = fix(folder, tmp_path / f"out{number}")
        assert fixed.dtype == (expected if alpha != 8 else "float16")
        for module, update in meant(folder).items():
            np.testing.assert_allclose(as_one_scale(tmp_path / f"out{number}")[module], update, rtol=1e-5, atol=1e-6)


def test_the_base_is_written_as_the_user_names_it(tmp_path: Path, base: Path) -> None:
    folder = sound(tmp_path / "adapter", base=None, revision=None)
    assert fix(folder, tmp_path / "none").base_id is None

    fixed = fix(folder, tmp_path / "named", base=base, revision="v2")
    assert (fixed.base_id, fixed.revision) == ("base", "v2")

    snapshot = tmp_path / "models--org--model" / "snapshots" / COMMIT
    shutil.copytree(base, snapshot)
    fixed = fix(folder, tmp_path / "cached", base=snapshot)
    assert (fixed.base_id, fixed.revision) == ("org/model", COMMIT)


@pytest.mark.parametrize(
    ("alter", "kind", "match"),
    [
        (edit_config(use_dora=True), UnsupportedAdapterError, "DoRA"),
        (edit_config(modules_to_save=["lm_head"]), UnsupportedAdapterError, "whole copies"),
        (edit_config(bias="all"), UnsupportedAdapterError, "bias"),
        (edit_config(init_lora_weights="pissa"), UnsupportedAdapterError, "changes the weights"),
        (edit_config(alpha_pattern={"q_proj": 1, "layers.1.*": 2}), UnsupportedAdapterError, "several keys"),
        (pruned, UnsupportedAdapterError, "loram recover"),
        (drop(f"{UP}.lora_A.weight", f"{UP}.lora_B.weight"), UnsupportedAdapterError, "are missing"),
        (put(f"{UP}.lora_A.weight", np.ones((4, 25), np.float32)), PlanMismatchError, r"the base model has shape"),
        (put(f"{UP}.lora_A.weight", NAN), VerificationError, "NaN"),
        (pickled, CheckpointError, "pickle"),
    ],
)
def test_what_has_no_equal_in_canonical_form_is_refused_and_nothing_is_written(
    tmp_path: Path, base: Path, alter: Callable[[Path], None], kind: type[Exception], match: str
) -> None:
    folder = sound(tmp_path / "adapter")
    alter(folder)

    with pytest.raises(kind, match=match):
        fix(folder, tmp_path / "out", base=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    folder = sound(tmp_path / "adapter")

    with pytest.raises(InvalidRequestError, match="target is 'tgi'"):
        examine(folder, "tgi")  # type: ignore[arg-type]  # what a user may type
    with pytest.raises(InvalidRequestError, match="overlap"):
        fix(folder, folder, overwrite=True)
    with pytest.raises(InvalidRequestError, match="dtype is 'int8'"):
        fix(folder, tmp_path / "out", dtype="int8")  # type: ignore[arg-type]  # what a user may type


# Names on the Hub.


def put_into_cache(cache: Path, repo_id: str, folder: Path) -> None:
    """Move a folder to where huggingface_hub would have downloaded it, as commit `COMMIT` of main."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / COMMIT)


def test_an_adapter_on_the_hub_is_held_against_the_base_that_it_names(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    put_into_cache(tmp_path / "hub", "org/tuned", sound(tmp_path / "adapter"))
    unknown = examine("org/tuned", "vllm")
    put_into_cache(tmp_path / "hub", "org/base", Path(shutil.copytree(base, tmp_path / "copy")))
    known = examine("org/tuned", "vllm")

    assert [gap.partition(":")[0] for gap in unknown.not_checked] == ["shapes and targets"]
    assert (known.verdict, known.not_checked) == ("serves", ())
    lora = "--enable-lora --max-lora-rank 8 --lora-modules tuned=org/tuned"
    assert known.command == unknown.command == (f"vllm serve org/base --revision {COMMIT} {lora}",)
    assert fix("org/tuned", tmp_path / "out", base="org/base").base_id == "org/base"
    assert check_adapter(tmp_path / "out", architecture=ARCHITECTURE).revision == COMMIT


def test_a_path_that_an_adapter_on_the_hub_names_is_not_opened(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    put_into_cache(tmp_path / "hub", "org/tuned", sound(tmp_path / "adapter", base=base))

    assert [gap.partition(":")[0] for gap in examine("org/tuned", "vllm").not_checked] == ["shapes and targets"]


# No crash, no network, no torch.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=6), children, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
        "alpha_pattern", "use_rslora", "use_dora", "bias", "modules_to_save", "init_lora_weights", "peft_type",
        "base_model_name_or_path", "revision", "task_type", "auto_mapping",
    ]
)  # fmt: skip


@settings(max_examples=200)
@given(changes=st.dictionaries(KEYS, VALUES, max_size=5), tokens=VALUES)
def test_no_config_makes_the_doctor_crash(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], tokens: Any
) -> None:
    folder = tmp_path_factory.mktemp("any") / "adapter"
    save_adapter(folder, random_factors({UP: (37, 24)}))
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))
    (folder / "added_tokens.json").write_text(json.dumps(tokens))

    for target in TARGETS:
        assert examine(folder, target).target == target
    shutil.rmtree(folder.parent)


def test_a_local_adapter_needs_neither_network_nor_torch(tmp_path: Path, base: Path) -> None:
    folder = sound(tmp_path / "adapter", use_rslora=True)
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft'): sys.modules[name] = None\n"
        "def refuse(event, args):\n"
        "    assert not event.startswith('socket.'), event\n"
        "sys.addaudithook(refuse)\n"
        "from loram_hub.doctor import TARGETS, examine, fix\n"
        f"for target in TARGETS: examine({str(folder)!r}, target)\n"
        f"for target in TARGETS: examine({str(folder)!r}, target, base={str(base)!r})\n"
        f"fix({str(folder)!r}, {str(tmp_path / 'out')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])

    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_texts_are_plain_and_name_no_server_option_that_is_not_in_the_command() -> None:
    for rule in RULES:
        for effect in rule.effects.values():
            assert not re.search(r"[^\x20-\x7e]", effect.why + effect.source + rule.remedy)
            assert re.search(r"run|read", effect.source)
