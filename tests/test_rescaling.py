"""Run with: pytest tests/test_rescaling.py"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from builders import SEVEN, save_base, save_tokenizer, tiny_config
from killed import bytes_of, run_killed
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from loram_hub.adapter import check_adapter, read_record
from loram_hub.auto import AutoLoramModel
from loram_hub.errors import CheckpointError, IncompatibleError, InvalidRequestError, LoramError, VerificationError
from loram_hub.inspection import verify
from loram_hub.pruning import prune
from loram_hub.recovery import recover
from loram_hub.rescaling import ScaledAdapter, ScaleSearch, recover_scaled, set_scale_
from loram_hub.rescaling.search import lowest
from loram_hub.seals import SEAL, seal

WEIGHTS, RECORD = "adapter_model.safetensors", "loram.json"
TASKS = [
    {"prompt": f"w{4 + n % 20} w{5 + n % 7}", "completion": f" w{24 + n % 20} w{30 + (n * n) % 5}"} for n in range(40)
]
"""A task with a pattern: the first word of the answer follows from the prompt."""
ODD = [task for number, task in enumerate(TASKS) if number % 2]
EVEN = [task for number, task in enumerate(TASKS) if not number % 2]


def words_of(task: dict[str, str]) -> list[int]:
    return [int(word[1:]) for word in f"{task['prompt']}{task['completion']}".split()]


def batch_of(tasks: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels: every task has a prompt of two tokens, and a completion of two with the end after it."""
    ids = torch.tensor([[*words_of(task), 2] for task in tasks])
    return ids, torch.cat([torch.full((len(tasks), 2), -100), ids[:, 2:]], dim=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save_base(tmp_path_factory.mktemp("rescaling") / "base", tiny_config(layers=4)))


@pytest.fixture(scope="module")
def release(base: Path) -> Path:
    out = base.parent / "release"
    return prune(base, out, pruning_ratio=0.3, importance="magnitude", keep_first=1, keep_last=1).folder


@pytest.fixture(scope="module")
def trained(base: Path, release: Path) -> Path:
    """An adapter that learned the task on the release, by a plain loop over all of it."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoLoramModel.from_pretrained(release, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=list(SEVEN), task_type="CAUSAL_LM"),
    )
    ids, labels = batch_of(TASKS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(str(base.parent / "trained"))
    return base.parent / "trained"


def divided(adapter: Path, out: Path, divisor: float) -> Path:
    """Copy an adapter with every lora_B divided."""
    out.mkdir()
    (out / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = {
        name: (tensor / divisor).astype(np.float32) if ".lora_B." in name else tensor
        for name, tensor in load_file(adapter / WEIGHTS).items()
    }
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def halved(trained: Path) -> Path:
    return divided(trained, trained.parent / "halved", 2)


@pytest.fixture(scope="module")
def rescaled(halved: Path, base: Path, release: Path) -> ScaledAdapter:
    return scaled(halved, base.parent / "rescaled", base=base, release=release)


def scaled(adapter: Path, out: Path, **options: Any) -> ScaledAdapter:
    return recover_scaled(adapter, out, **{"data": TASKS, "compute_dtype": torch.float32} | options)


def loss_at(base: Path, recovered: Path, scale: float) -> float:
    """Merge scale * B A into the weights by hand and take transformers' own loss."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tensors = {
        name: torch.from_numpy(tensor.astype(np.float32)) for name, tensor in load_file(recovered / WEIGHTS).items()
    }
    config = json.loads((recovered / "adapter_config.json").read_text())
    for name, lora_A in tensors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lora_B = tensors[name.replace(".lora_A.", ".lora_B.")]
            model.get_submodule(module).weight.data += scale * config["lora_alpha"] / config["r"] * lora_B @ lora_A
    ids, labels = batch_of(TASKS)
    with torch.no_grad():
        loss: float = model(input_ids=ids, labels=labels).loss.item()
    return loss


@pytest.fixture(scope="module")
def plain(halved: Path, base: Path, release: Path) -> Path:
    """The halved adapter, recovered in fp32 without a scale."""
    return recover(halved, base.parent / "plain", release=release, dtype="float32").folder


def test_an_adapter_of_half_the_length_gets_the_scale_that_brute_force_finds(
    rescaled: ScaledAdapter, base: Path, plain: Path
) -> None:
    grid = {scale: loss_at(base, plain, scale) for scale in np.geomspace(0.5, 4, 25)}
    best = min(grid, key=lambda scale: grid[scale])

    assert 1.4 < best < 3.9  # a minimum that lies inside
    assert rescaled.scale.factor == pytest.approx(best, rel=0.1)  # the grid's step is 9 %
    assert dict(rescaled.scale.losses)[rescaled.scale.factor] <= min(grid.values()) + 1e-3
    assert rescaled.gain == pytest.approx(loss_at(base, plain, 1.0) - min(grid.values()), abs=2e-3)


def test_halving_an_adapter_doubles_its_scale(
    rescaled: ScaledAdapter, trained: Path, base: Path, release: Path, tmp_path: Path
) -> None:
    whole = scaled(trained, tmp_path / "whole", base=base, release=release, dry_run=True)

    assert rescaled.scale.factor / whole.scale.factor == pytest.approx(2, rel=0.06)  # each is found to 3 %


def test_losses_are_those_of_the_model_at_each_scale(rescaled: ScaledAdapter, base: Path, plain: Path) -> None:
    assert 3 <= len(rescaled.scale.losses) <= ScaleSearch().evaluations
    for scale, loss in rescaled.scale.losses:
        assert loss == pytest.approx(loss_at(base, plain, scale), abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_written_factors_are_the_exact_product_rounded_once(
    halved: Path, base: Path, release: Path, plain: Path, tmp_path: Path, dtype: str
) -> None:
    found = scaled(halved, tmp_path / "out", base=base, release=release, dtype=dtype)

    number = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype]
    before, after = load_file(plain / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        scale = np.float32(found.scale.factor if ".lora_B." in name else 1)
        assert after[name].dtype == number
        assert np.array_equal(after[name], (tensor * scale).astype(number))
    assert found.adapter.nbytes == (tmp_path / "out" / WEIGHTS).stat().st_size


def test_rank_alpha_and_base_stay_and_peft_gives_the_loss_that_was_promised(
    rescaled: ScaledAdapter, base: Path, plain: Path
) -> None:
    out = rescaled.adapter.folder

    assert (out / "adapter_config.json").read_bytes() == (plain / "adapter_config.json").read_bytes()
    assert loss_at(base, out, 1.0) == pytest.approx(dict(rescaled.scale.losses)[rescaled.scale.factor], abs=2e-3)


def test_the_record_says_what_was_tried_and_stands_up_to_verification(rescaled: ScaledAdapter, base: Path) -> None:
    out = rescaled.adapter.folder

    verified = verify(out, base=base)
    record = read_record(out)

    assert verified.kind == "recovered adapter"
    assert record.scale == rescaled.scale
    assert record.scale is not None
    assert record.scale.examples == len(TASKS)
    assert record.scale.tokens == 3 * len(TASKS)
    assert record.files["adapter_model.safetensors"].size == rescaled.adapter.nbytes


def test_a_record_without_a_scale_says_nothing_of_one(plain: Path) -> None:
    assert read_record(plain).scale is None
    assert "scale" not in json.loads((plain / RECORD).read_text())


def test_the_same_data_in_another_order_give_the_same_bytes(
    rescaled: ScaledAdapter, halved: Path, base: Path, release: Path, tmp_path: Path
) -> None:
    again = scaled(halved, tmp_path / "again", base=base, release=release, data=TASKS[::-1])

    assert bytes_of(again.adapter.folder) == bytes_of(rescaled.adapter.folder)


def test_other_data_have_another_digest(halved: Path, base: Path, release: Path, tmp_path: Path) -> None:
    digests = {
        scaled(halved, tmp_path / "x", base=base, release=release, data=data, dry_run=True).scale.data_sha256
        for data in (ODD, EVEN)
    }

    assert len(digests) == 2


def test_a_dry_run_chooses_the_same_and_writes_nothing(
    rescaled: ScaledAdapter, halved: Path, base: Path, release: Path, tmp_path: Path
) -> None:
    found = scaled(halved, tmp_path / "out", base=base, release=release, dry_run=True)

    assert found.scale == rescaled.scale
    assert found.adapter.nbytes == rescaled.adapter.nbytes
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_chance_alone_would_change_stays_as_it_was_trained(
    base: Path, release: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    still = divided(trained, tmp_path / "still", 1e12)  # too small for any scale to matter

    found = scaled(still, tmp_path / "out", base=base, release=release)

    assert found.scale.factor == 1.0
    assert found.gain == 0.0
    assert "beyond chance" in caplog.text
    plain = recover(still, tmp_path / "plain", release=release)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (plain.folder / WEIGHTS).read_bytes()


def test_standard_error_is_that_of_the_paired_differences(base: Path, rescaled: ScaledAdapter, plain: Path) -> None:
    """With two sequences for each of 20 groups, all of three tokens, the ratio of sums is a mean over groups."""
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(plain)
    ).eval()
    losses: dict[float, list[float]] = {}
    for scale in (1.0, rescaled.scale.factor):
        set_scale_(model, scale)
        losses[scale] = [one_loss(model, task) for task in sorted(TASKS, key=words_of)]

    before, after = (np.array(each).reshape(20, 2).mean(axis=1) for each in losses.values())
    expected = (before - after).std(ddof=1) / math.sqrt(20)
    assert rescaled.scale.standard_error == pytest.approx(expected, rel=1e-3)


def one_loss(model: Any, task: dict[str, str]) -> float:
    ids, labels = batch_of([task])
    with torch.no_grad():
        loss: float = model(input_ids=ids, labels=labels).loss.item()
    return loss


def test_few_examples_are_warned_about(
    halved: Path, base: Path, release: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scaled(halved, tmp_path / "out", base=base, release=release, data=TASKS[:5], dry_run=True)

    assert "5 sequences only" in caplog.text


def test_the_end_of_the_range_is_warned_about(
    halved: Path, base: Path, release: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = ScaleSearch(low=0.9, high=1.1)

    found = scaled(halved, tmp_path / "out", base=base, release=release, search=search, dry_run=True)

    assert found.scale.factor == 1.1
    assert "end of the range" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": TASKS[:1]}, InvalidRequestError, "has 1 sequence"),
        ({"data": [{"question": "w4"}]}, InvalidRequestError, "question"),
        ({"data": []}, InvalidRequestError, "holds no text"),
        ({"data": "missing.jsonl"}, InvalidRequestError, "missing.jsonl"),
        ({"base": None}, InvalidRequestError, "--base"),
        ({"dtype": "int8"}, InvalidRequestError, "int8"),
        ({"device": "foo"}, InvalidRequestError, "'foo'; this machine"),
        ({"device": "disk"}, InvalidRequestError, "'disk'; this machine"),
        ({"device": "meta"}, InvalidRequestError, "'meta'; this machine"),
        ({"device": "cuda:999"}, InvalidRequestError, "'cuda:999'; this machine"),
    ],
    ids=[
        "one example",
        "unknown fields",
        "empty",
        "no file",
        "no base",
        "no such type",
        "no such device",
        "disk",
        "no memory",
        "no such GPU",
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    halved: Path,
    base: Path,
    release: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        scaled(halved, tmp_path / "out", **{"base": base, "release": release} | options)

    assert list(tmp_path.iterdir()) == []


def test_another_base_is_refused(halved: Path, release: Path, tmp_path: Path) -> None:
    other = save_tokenizer(save_base(tmp_path / "other", tiny_config(layers=4, rms_norm_eps=1e-3)))

    with pytest.raises(IncompatibleError, match="made for a base") as caught:
        scaled(halved, tmp_path / "out", base=other, release=release)

    assert str(caught.value).startswith(f"{halved} was made")
    assert "--allow-base-mismatch" not in str(caught.value)  # `recover` has no such option


@pytest.mark.parametrize("damage", ["no weights", "torn weights", "a tensor too few"])
def test_a_base_without_all_its_weights_is_refused(
    halved: Path, base: Path, release: Path, tmp_path: Path, damage: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = broken / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})

    with pytest.raises(LoramError, match="broken"):
        scaled(halved, tmp_path / "out", base=broken, release=release)


def test_a_base_without_tokenizer_is_refused(halved: Path, release: Path, tmp_path: Path) -> None:
    bare = save_base(tmp_path / "bare", tiny_config(layers=4))

    with pytest.raises(CheckpointError, match="tokenizer"):
        scaled(halved, tmp_path / "out", base=bare, release=release)


def test_a_base_that_gives_no_number_is_refused(halved: Path, base: Path, release: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in base.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(IncompatibleError, match="no finite loss"):
        scaled(halved, tmp_path / "out", base=broken, release=release)


def test_an_existing_folder_is_left_alone_unless_asked(halved: Path, base: Path, release: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")

    with pytest.raises(InvalidRequestError, match="not empty"):
        scaled(halved, tmp_path / "out", base=base, release=release)
    assert (tmp_path / "out" / "note").read_text() == "mine"

    scaled(halved, tmp_path / "out", base=base, release=release, overwrite=True)
    assert check_adapter(tmp_path / "out").record is not None


def test_a_killed_run_leaves_the_old_folder_or_the_new_one(
    halved: Path, trained: Path, base: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    out = tmp_path / "out"
    recover(trained, out, release=release)
    old = bytes_of(out)
    (tmp_path / "old.json").write_text(json.dumps({name: data.hex() for name, data in old.items()}))

    at_work = run_killed(
        "import json, torch, peft, transformers, transformers.models.llama.modeling_llama\n"
        "from loram_hub.rescaling import recover_scaled\n"
        f"tasks = json.loads({json.dumps(json.dumps(TASKS))})\n"
        "torch.set_num_threads(1)",
        "recover_scaled(adapter, out, data=tasks, base=base, release=release, overwrite=True,"
        " compute_dtype=torch.float32)",
        "found = {name: data.hex() for name, data in bytes_of(Path(out)).items()}\n"
        "new = {name: data.hex() for name, data in bytes_of(Path(out + '-timed')).items()}\n"
        "assert found in (json.loads(Path(old).read_text()), new)",
        kills=4,
        adapter=str(halved),
        base=str(base),
        release=str(release),
        out=str(out),
        old=str(tmp_path / "old.json"),
    )

    assert at_work >= 2
    assert bytes_of(out) == bytes_of(Path(f"{out}-timed"))
    assert sorted(os.listdir(tmp_path)) == ["old.json", "out", "out-timed", "scratch"]


def edit_scale(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / RECORD).read_text())
    values["scale"] = values["scale"] | changes
    (folder / RECORD).write_text(seal({key: value for key, value in values.items() if key != SEAL}))


@pytest.mark.parametrize(
    "changes",
    [
        {"factor": 0.123},
        {"factor": [1.0]},
        {"losses": [[1.0, 2.0]] * 2},
        {"losses": [[1.5, 2.0], [1.0, 2.0]]},
        {"losses": [[1.0, 10**400]]},
        {"losses": [[-1.0, 2.0], [1.0, 2.0]]},
        {"losses": [[1.0, 2.0, 3.0]]},
        {"losses": []},
        {"standard_error": -0.1},
        {"examples": True},
        {"tokens": 0},
        {"data_sha256": "f" * 63},
        {"base_commit": 7},
        {"note": "x"},
    ],
    ids=lambda changes: f"{next(iter(changes))}={next(iter(changes.values()))!r:.20}",
)
def test_a_record_of_a_scale_that_cannot_be_is_refused(
    rescaled: ScaledAdapter, tmp_path: Path, changes: dict[str, Any]
) -> None:
    for path in rescaled.adapter.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_scale(tmp_path, **changes)

    with pytest.raises(VerificationError):
        read_record(tmp_path)


@pytest.mark.parametrize("best", [0.3, 0.7, 1.0, 1.37, 2.0, 3.6])
@pytest.mark.parametrize("shape", ["parabola", "steep above", "steep below", "flat floor"])
def test_the_lowest_point_of_a_valley_is_found_in_eight_tries(best: float, shape: str) -> None:
    def loss(scale: float) -> float:
        away = math.log(scale / best)
        match shape:
            case "parabola":
                return 2 + away**2
            case "steep above":
                return 2 + math.exp(2 * away) - 2 * away
            case "steep below":
                return 2 + math.exp(-2 * away) + 2 * away
            case _:
                return 2 + away**4

    found = lowest(loss, ScaleSearch())

    assert len(found) <= 8
    assert next(iter(found)) == 1.0
    gain_possible = loss(1.0) - loss(best)
    assert min(found.values()) - loss(best) <= max(0.02 * gain_possible, 1e-3)


def test_what_overflows_counts_as_worst() -> None:
    found = lowest(lambda scale: math.nan if scale > 1.2 else (scale - 1.1) ** 2, ScaleSearch())

    assert min((loss, scale) for scale, loss in found.items() if math.isfinite(loss))[1] == pytest.approx(1.1, abs=0.06)


def test_nothing_outside_the_range_is_tried() -> None:
    search = ScaleSearch(low=0.8, high=1.3, evaluations=12)

    falling, rising = lowest(lambda scale: -scale, search), lowest(lambda scale: scale, search)

    assert min(falling, key=lambda scale: falling[scale]) == 1.3
    assert min(rising, key=lambda scale: rising[scale]) == 0.8
    assert all(0.8 <= scale <= 1.3 for scale in [*falling, *rising])


@pytest.mark.parametrize(
    "changes", [{"low": 0.0}, {"low": 1.5}, {"high": 0.9}, {"high": math.inf}, {"evaluations": 2}, {"limit": 1}]
)
def test_a_search_without_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        replace(ScaleSearch(), **changes)


@pytest.fixture(autouse=True)
def _listen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
