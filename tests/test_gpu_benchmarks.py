"""The GPU benchmarks run on a CPU with a tiny model, and their tables say what was measured and nothing else.

Run with: pytest tests/test_gpu_benchmarks.py
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from builders import save_base, save_tokenizer

pytest.importorskip("bitsandbytes")

from loram_hub.auto import AutoLoramModel
from loram_hub.plan import parameter_counts
from loram_hub.pruning import prune

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [str(ROOT / "benchmarks" / "gpu"), str(ROOT / "benchmarks")]
SCRIPTS = ("qloram_step", "unpruned", "taylor_block", "load")


@pytest.fixture(autouse=True, scope="module")
def _scripts_can_be_imported() -> Iterator[None]:
    sys.path[:0] = FOLDERS
    yield
    for folder in FOLDERS:
        sys.path.remove(folder)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("shape", "ratio", "parameters"),
    [
        ("LLaMA-3.1-70B", 0.85, 17_849_982_976),
        ("LLaMA-2-70B", 0.65, 28_099_436_544),
        ("LLaMA-2-70B", 0.95, 9_662_226_432),
        ("LLaMA-2-13B", 0.65, 6_005_662_720),
        ("LLaMA-3.1-70B", 0.0, 70_553_706_496),
        ("LLaMA-3.1-8B", 0.0, 8_030_261_248),
    ],
)
def test_shapes_have_the_parameters_of_the_models_they_are_named_after(
    shape: str, ratio: float, parameters: int
) -> None:
    architecture, layers = script("gpu_shapes").layers_of(script("gpu_shapes").config_of(shape), ratio)

    assert parameter_counts(architecture, layers).pruned_parameters == parameters


def rounded(table: torch.Tensor) -> list[float]:
    return [round(value, 5) for value in table.tolist()]  # bitsandbytes computes its tables, we state them


def described(model: Any) -> dict[str, Any]:
    """Shape and type of everything that a model holds, NF4 states and all."""
    found: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = (tuple(tensor.shape), tensor.dtype)
        if (state := getattr(tensor, "quant_state", None)) is not None:
            parts = {key: value for key, value in state.as_dict(packed=False).items() if torch.is_tensor(value)}
            found[f"{name} state"] = {key: (tuple(value.shape), value.dtype) for key, value in parts.items()}
            found[f"{name} settings"] = (state.blocksize, state.quant_type, tuple(state.shape), state.dtype)
            found[f"{name} tables"] = (rounded(state.code), rounded(state.state2.code), state.state2.blocksize)
    return found


def test_a_random_model_has_the_tensors_of_a_real_release_that_was_loaded(tmp_path: Path) -> None:
    config = script("gpu_shapes").config_of("tiny")
    base = save_tokenizer(save_base(tmp_path / "base", config, dtype="bfloat16"), vocab_size=512)
    release = prune(base, tmp_path / "release", pruning_ratio=0.5, importance="random", quantize=True)
    loaded = AutoLoramModel.from_pretrained(release.folder, dtype=torch.bfloat16)

    made = script("random_models").random_model(config, release.architecture, release.plan.layers, device="cpu")

    assert described(made) == described(loaded)
    assert type(made).__name__ == "LlamaForCausalLM"
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_random_codes_dequantize_to_weights_of_a_plausible_size() -> None:
    import bitsandbytes as bnb

    linear = torch.nn.Linear(96, 40, bias=False, device="meta")
    made = script("random_models").random_nf4(linear, torch.Generator().manual_seed(0))

    weight = bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)

    assert weight.shape == (40, 96)
    assert torch.isfinite(weight).all()
    assert 0.003 < weight.float().std() < 0.03  # trained weights have about 0.01 to 0.02
    assert abs(weight.float().mean()) < 0.003


@pytest.fixture(scope="module")
def line() -> dict[str, Any]:
    """What qloram_step finds on a tiny release."""
    steps = script("qloram_step")
    found: dict[str, Any] = steps.step("tiny", 0.5, "embedding in main memory, lm_head in NF4", "cpu", **steps.TINY)
    return found


def test_a_step_is_taken_at_each_micro_batch_with_its_prediction(line: dict[str, Any]) -> None:
    assert list(line["micro_batches"]) == ["1", "2"]
    assert line["loss"] == "trl"
    for micro_batch, found in line["micro_batches"].items():
        assert found["loss_is_finite"]
        assert found["ms_fastest"] <= found["ms_per_step"] <= found["ms_slowest"]
        assert found["tokens_per_second"] == pytest.approx(int(micro_batch) * 16e3 / found["ms_per_step"])
        assert found["predicted"]["embedding"] == 0
        assert found["predicted"]["lm_head"] < 2 * 512 * 128 / 3  # NF4
    assert json.loads(json.dumps(line, allow_nan=False)) == line


def steps_of(*, has_trl: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny model that can be stepped, with both factors of every pair away from zero, as after training."""
    shapes, training = script("gpu_shapes"), script("training_step")
    config = shapes.config_of("tiny")
    model = script("random_models").random_model(config, *shapes.layers_of(config, 0.5), device="cpu")
    monkeypatch.setattr(training, "DROPOUT", 0.0)
    if not has_trl:
        monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    torch.manual_seed(0)
    ready = training.Steps(model, training.MemoryOptions())
    generator = torch.Generator().manual_seed(1)
    for factor in ready.factors:
        factor.data.normal_(0, 0.02, generator=generator)
    return ready


def test_a_step_moves_the_adapter_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = steps_of(has_trl=True, monkeypatch=monkeypatch)
    before = {name: parameter.detach().clone() for name, parameter in ready.adapted.named_parameters()}

    ready.step(torch.arange(24)[None] + 5)

    after = dict(ready.adapted.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(moved) == 2 * 7 * 8
    assert {factor.dtype for factor in ready.factors} == {torch.bfloat16}


def test_the_loss_without_trl_is_the_same_and_that_of_the_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 512, (2, 300), generator=torch.Generator().manual_seed(0))
    ready = steps_of(has_trl=True, monkeypatch=monkeypatch)
    with torch.no_grad():
        logits = ready.adapted(input_ids=ids, use_cache=False).logits.float()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    with_trl = ready.step(ids)
    without = steps_of(has_trl=False, monkeypatch=monkeypatch).step(ids)

    assert with_trl == pytest.approx(expected, rel=2e-3)  # bf16
    assert without == pytest.approx(expected, rel=2e-3)


def test_running_out_of_memory_is_a_result_that_ends_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    training = script("training_step")

    def overflow(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    ready = steps_of(has_trl=True, monkeypatch=monkeypatch)
    monkeypatch.setattr(training, "Steps", lambda *_: ready)
    monkeypatch.setattr(ready, "step", overflow)

    found = training.measure(
        lambda: None, options={}, micro_batches=[1, 4], sequence_length=8, warm_up=1, steps=1
    )  # fmt: skip

    assert found["micro_batches"] == {"1": {"out_of_memory": True}}


def test_taylor_scores_every_group_of_a_block_and_the_difference_is_the_time_of_a_layer(tmp_path: Path) -> None:
    taylor = script("taylor_block")

    run = taylor.score("tiny", 2, str(tmp_path / "block"), "cpu")

    assert run["scored"] == 2 * (4 + 384)  # KV heads and channels
    assert not (tmp_path / "block").exists()
    combined = taylor.combined("tiny", {2: run | {"seconds": 1.0}, 4: run | {"seconds": 1.5}})
    assert combined["seconds_per_layer"] == 0.25


def test_loading_compares_medians_of_files_that_hold_the_same(tmp_path: Path) -> None:
    release, load = script("load_release"), script("load")
    folders = {kind: str(tmp_path / kind) for kind in ("release", "stock")}

    made = release.make_both(folders, dict(script("gpu_shapes").SHAPES["tiny"]), load.RATIO)
    found = {kind: release.load_once(kind, folder)["model_bytes"] for kind, folder in folders.items()}
    combined = load.combined("tiny", "cpu", made, found, {"release": [2.0, 4.0, 9.0], "stock": [5.0, 2.0, 2.0]})

    assert made["release"] == made["stock"] > 0
    assert min(found.values()) > 0
    assert combined["release_to_stock"] == 2.0


def step_line(shape: str, ratio: float, layers: int, milliseconds: float, gb: float, **more: Any) -> dict[str, Any]:
    """A line as qloram_step or unpruned prints it, of micro-batch 4."""
    figures = {"ms_per_step": milliseconds, "tokens_per_second": 2048e3 / milliseconds}
    figures |= {key: gb * 1e9 for key in ("peak_allocated", "peak_reserved", "device_used")}
    figures |= {"predicted": {"allocated": 0.9e9 * gb}}
    return {
        "benchmark": "unpruned" if ratio == 0 else "qloram_step",
        "quick": False,
        "date": "2000-01-01",
        "versions": {"torch": "0"},
        "figures": {
            "shape": shape,
            "ratio": ratio,
            "options": "plain",
            "layers": layers,
            "device": {"kind": "cuda", "name": "a card"},
            "micro_batches": {"4": figures},
            **more,
        },
    }


def cells(text: str, *start: str) -> list[str]:
    """The row of a table that starts with some cells."""
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {' | '.join(start)} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_tables_hold_what_was_measured_and_say_so_of_the_rest() -> None:
    lines = [step_line("LLaMA-3.1-70B", 0.85, 80, 500, 15.0)]
    lines += [step_line("LLaMA-3.1-70B", 0, layers, 100 + 20 * layers, 5 + 0.5 * layers) for layers in (8, 16, 32)]

    text = script("table").render(lines)

    assert cells(text, "LLaMA-3.1-70B", "0.85", "plain", "4")[4:] == [
        "15.00", "15.00", "15.00", "13.50", "0.90", "500", "4,096",
    ]  # fmt: skip
    assert set(cells(text, "LLaMA-3.1-70B", "0.85", "plain", "1")[4:]) == {"not measured"}
    # 100 + 20 * 80 and 5 + 0.5 * 80: the whole model did not fit, the line through the others goes there
    assert cells(text, "LLaMA-3.1-70B", "4")[2:] == ["20.0", "1,700", "not measured", "45.00", "not measured"]
    assert cells(text, "LLaMA-3.1-70B", "0.85", "4")[3:] == ["3.00", "3.40", "3.40"]
    met = [line for line in text.splitlines() if line.endswith("| yes |")]
    assert len(met) == 2  # the peak, and the step: 0.29 of the unpruned one
    assert "a card" in text


def test_a_missed_target_is_said_aloud() -> None:
    text = script("table").render([step_line("LLaMA-3.1-70B", 0.85, 80, 500, 20.1)])

    assert "| 20.10 GB | **no** |" in text


def test_lines_of_tiny_models_never_get_into_a_table(tmp_path: Path) -> None:
    quick: Mapping[str, Any] = step_line("LLaMA-3.1-70B", 0.85, 80, 500, 15.0) | {"quick": True}
    (tmp_path / "results.jsonl").write_text(f"a warning\n{json.dumps(quick)}\n")

    assert script("table").read_lines([tmp_path / "results.jsonl"]) == []


def test_the_tables_of_the_document_are_those_of_the_results_beside_it() -> None:
    table = script("table")
    results = ROOT / "benchmarks" / "gpu" / "results.jsonl"
    text = table.README.read_text(encoding="utf-8")

    lines = table.read_lines([results] if results.exists() else [])

    assert table.with_tables(text, table.render(lines)) == text
    assert all(f"`{name}.py`" in text for name in (*SCRIPTS, "run_all", "table"))


def test_every_script_has_a_slot_and_a_slot_that_hangs_ends_with_all_that_it_started(tmp_path: Path) -> None:
    run_all = script("run_all")
    assert {slot[0] for slot in run_all.SLOTS.values()} == {f"{name}.py" for name in SCRIPTS}
    child = [sys.executable, "-c", "import time; time.sleep(60)"]
    hanging = f"import subprocess, time; print(subprocess.Popen({child!r}).pid, flush=True); time.sleep(60)"

    began = time.monotonic()
    run_all.run_slot([sys.executable, "-c", hanging], tmp_path / "out.jsonl", 1.5)

    assert time.monotonic() - began < 30
    started = int((tmp_path / "out.jsonl").read_text())
    while time.monotonic() - began < 30 and is_running(started):
        time.sleep(0.01)
    assert not is_running(started)


def is_running(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_scripts_find_what_they_share_wherever_they_are_started(tmp_path: Path) -> None:
    run_all = script("run_all")

    for name in SCRIPTS:
        run_all.run_slot([sys.executable, str(run_all.HERE / f"{name}.py"), "--help"], tmp_path / name, 60)

    assert all("--device" in (tmp_path / name).read_text() for name in SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tiny_run_on_a_cpu_prints_lines_of_json_that_say_they_prove_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Actions that would have a process each run in this one."""
    module = script(name)

    def act(file: str, action: str, **arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = getattr(script(Path(file).stem), action)(**json.loads(json.dumps(arguments)))
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]  # what passes between processes

    monkeypatch.setattr(module, "measured", act)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--device", "cpu", "--tiny"])

    module.main()

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == (3 if name == "unpruned" else 1)  # a line for each depth
    assert all(line["benchmark"] == name and line["quick"] for line in lines)
    assert all(line["figures"]["device"]["kind"] == "cpu" for line in lines)
