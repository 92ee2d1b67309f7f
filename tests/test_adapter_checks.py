"""Checking an adapter folder: what passes, what is refused and why, and what could not be told."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
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
    save_metadata_release,
    tiny_architecture,
    tiny_config,
)
from safetensors.numpy import load_file, save_file

from loram_hub import recover
from loram_hub.adapter import check_adapter, looks_pruned, read_record, refuse_pruned
from loram_hub.errors import IncompatibleError, LoramError, UnsupportedAdapterError
from loram_hub.files import dump_json
from loram_hub.plan import Plan

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "loram.json"
PREFIX = "base_model.model."
UP = "model.layers.1.mlp.up_proj"
ARCHITECTURE = tiny_architecture()
WHOLE = projections(Plan(ARCHITECTURE, {}))


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recovered adapter; tests copy it."""
    folder = tmp_path_factory.mktemp("recovered")
    plan = half_plan(ARCHITECTURE)
    release = save_metadata_release(folder / "release", tiny_config(), plan)
    trained = save_adapter(folder / "trained", random_factors(projections(plan)), targets=list(SEVEN), base=release)
    recover(trained, folder / "adapter", release=release)
    return folder / "adapter"


@pytest.fixture
def adapter(recovered: Path, tmp_path: Path) -> Path:
    """A copy of the recovered adapter, to be altered."""
    shutil.copytree(recovered, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A full-size adapter as PEFT saves it, to be altered."""
    return save_adapter(tmp_path / "stock", random_factors(WHOLE), targets=list(SEVEN), base="org/base")


def test_a_recovered_adapter_passes_with_nothing_left_unchecked(recovered: Path) -> None:
    checked = check_adapter(recovered, architecture=ARCHITECTURE)

    assert checked.kind == "recovered adapter"
    assert checked.files == (CONFIG, WEIGHTS, RECORD)
    assert checked.nbytes == sum(path.stat().st_size for path in recovered.iterdir())
    assert (checked.base_id, checked.revision, checked.rank) == ("org/base", "0123456789abcdef" * 2 + "01234567", 4)
    assert (len(checked.modules), checked.not_checked) == (28, ())
    assert checked.record == read_record(recovered)


def test_a_stock_adapter_passes_and_what_was_not_checked_is_said(stock: Path) -> None:
    checked = check_adapter(stock)

    assert (checked.kind, checked.record, checked.base_id) == ("PEFT adapter", None, "org/base")
    assert [gap.partition(":")[0] for gap in checked.not_checked] == [
        "hashes",
        "shapes, and factors missing for declared targets",
    ]
    assert len(check_adapter(stock, architecture=ARCHITECTURE).not_checked) == 1


def test_what_peft_saves_passes_as_it_is(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in tiny_config().items() if key not in ("model_type", "architectures")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values))
    config = LoraConfig(r=4, target_modules=list(SEVEN), task_type="CAUSAL_LM", init_lora_weights="gaussian")
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))

    checked = check_adapter(tmp_path / "adapter", architecture=ARCHITECTURE)
    assert checked.files == ("README.md", CONFIG, WEIGHTS)
    assert len(checked.modules) == 28


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "LICENSE",
        "NOTICE.txt",
        "USE_POLICY.md",
        "tokenizer.json",
        "chat_template.jinja",
        "pictures/loss.png",
        ".eval_results/mmlu.yaml",
        ".gitattributes",
        ".git/hooks/pre-commit.py",
        ".cache/huggingface/download/x.bin",
    ],
)
def test_companions_may_lie_beside_it(adapter: Path, name: str) -> None:
    (adapter / name).parent.mkdir(parents=True, exist_ok=True)
    (adapter / name).write_text("{}")

    assert check_adapter(adapter).kind == "recovered adapter"


def test_a_snapshot_of_the_hub_cache_may_link_to_its_blobs(adapter: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--adapter"
    snapshot, blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(adapter.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")

    assert check_adapter(snapshot, architecture=ARCHITECTURE).kind == "recovered adapter"

    (tmp_path / "elsewhere").write_text("{}")
    (snapshot / "README.md").symlink_to("../../../elsewhere")
    refused(snapshot, 3, "'README.md' .* leads out of the folder")


def refused(folder: Path, exit_code: int, match: str, **arguments: Any) -> None:
    """Assert that a check fails with one exit code and message."""
    with pytest.raises(LoramError, match=match) as caught:
        check_adapter(folder, **arguments)
    assert caught.value.exit_code == exit_code


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("adapter_model.bin", "is a pickle"),
        ("training_args.bin", "is a pickle"),
        ("optimizer.pt", "is a pickle"),
        ("scheduler.PTH", "is a pickle"),
        ("notes.pkl", "is a pickle"),
        ("modeling.py", "is code"),
        ("run.sh", "is code"),
        ("adapter_model-00002-of-00002.safetensors", "holds weights beside"),
        ("adapter_model.safetensors.index.json", "holds weights beside"),
        ("model.gguf", "holds weights beside"),
        ("pictures/model.safetensors", "holds weights beside"),
        ("config.json", "is no part of an adapter"),
        ("trainer_state.json", "is no part of an adapter"),
        ("deep/er/LICENSE", "is no part of an adapter"),
        ("README.md\x1b[2J", "no name that a file"),
        ("LICENSE\\..\\x", "no name that a file"),
    ],
)
def test_files_that_have_no_place_in_an_adapter_are_refused(adapter: Path, name: str, why: str) -> None:
    (adapter / name).parent.mkdir(parents=True, exist_ok=True)
    (adapter / name).write_bytes(b"{}")

    refused(adapter, 3, why)


def test_names_that_differ_only_by_case_are_refused(adapter: Path) -> None:
    (adapter / "LICENSE-mit").write_text("")
    (adapter / "LICENSE-MIT").write_text("")
    if len(list(adapter.glob("LICENSE*"))) == 1:
        pytest.skip("this file system does not tell letter case apart")

    refused(adapter, 3, "one file where letter case")


@pytest.mark.parametrize("is_folder", [False, True])
def test_links_out_of_the_folder_are_refused(adapter: Path, tmp_path: Path, is_folder: bool) -> None:
    target = tmp_path / "outside"
    if is_folder:
        target.mkdir()
        (adapter / "pictures").symlink_to(target)
        refused(adapter, 3, "'pictures' .* is no part of an adapter")
    else:
        shutil.move(adapter / WEIGHTS, target)
        (adapter / WEIGHTS).symlink_to(target)
        refused(adapter, 3, "leads out of the folder")


def test_a_pipe_is_refused_unopened(adapter: Path) -> None:
    os.mkfifo(adapter / "README.md")

    refused(adapter, 3, "no regular file")


def edit_config(**changes: Any) -> Callable[[Path], None]:
    """Return an alteration of the config."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(dump_json(values | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return an alteration of the tensors."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def set_tensor(name: str, value: Any) -> Callable[[Path], None]:
    """Return an alteration that puts one tensor in place."""
    return edit_tensors(lambda tensors: tensors.update({f"{PREFIX}{name}": value}))


def drop(*names: str) -> Callable[[Path], None]:
    """Return an alteration that takes tensors away."""
    return edit_tensors(lambda tensors: [tensors.pop(f"{PREFIX}{name}") for name in names])


def duplicate_name(folder: Path) -> None:
    """Give a tensor of the header the name of another of the same shape."""
    data = (folder / WEIGHTS).read_bytes()
    old, new = b"layers.0.mlp.up_proj.lora_A", b"layers.1.mlp.up_proj.lora_A"
    assert old in data
    (folder / WEIGHTS).write_bytes(data.replace(old, new))


ALTERATIONS: list[tuple[Callable[[Path], None], int, str]] = [
    (edit_config(use_dora=True), 4, "DoRA"),
    (edit_config(modules_to_save=["lm_head"]), 4, "whole copies of modules"),
    (edit_config(use_rslora="false"), 3, "use_rslora .* true or false"),
    (edit_config(custom_module="evil.Layer"), 4, "'custom_module' is set"),
    (edit_config(auto_map={"AutoModel": "x.Y"}), 4, "'auto_map' is set"),
    (edit_config(auto_mapping={"parent_library": "os"}), 3, "import 'os'"),
    (edit_config(auto_mapping=["os"]), 3, "auto_mapping"),
    (edit_config(task_type=["CAUSAL_LM"]), 3, "task_type"),
    (edit_config(r=5), 3, "rank 5"),
    (edit_config(target_modules=list(SEVEN[:6])), 4, "does not name it"),
    (set_tensor("lm_head.weight", np.zeros((2, 2), np.float32)), 4, "vocabulary was resized"),
    (set_tensor("lm_head.base_layer.weight", np.zeros((2, 2), np.float32)), 4, "copy of a frozen weight"),
    (set_tensor(f"{UP}.lora_A.weight", np.zeros((4, 24), np.int32)), 3, "I32"),
    (set_tensor(f"{UP}.lora_A.weight", np.full((4, 24), np.nan, np.float32)), 3, "NaN"),
    (set_tensor(f"{UP}.lora_A.weight", np.zeros((4, 0), np.float32)), 3, "none empty"),
    (set_tensor(f"{UP}.lora_A.weight", np.zeros((4,), np.float32)), 3, "two axes"),
    (drop(f"{UP}.lora_A.weight"), 4, "no lora_A"),
    (duplicate_name, 3, "twice"),
]


@pytest.mark.parametrize(("alter", "exit_code", "match"), ALTERATIONS)
def test_what_a_stock_adapter_may_not_hold_is_refused(
    stock: Path, alter: Callable[[Path], None], exit_code: int, match: str
) -> None:
    alter(stock)

    refused(stock, exit_code, match)


@pytest.mark.parametrize("changes", [{"target_modules": "all-linear"}, {"merge_weights": True}])
def test_settings_of_older_and_other_trainers_pass(stock: Path, changes: dict[str, Any]) -> None:
    edit_config(**changes)(stock)

    assert len(check_adapter(stock, architecture=ARCHITECTURE).modules) == 28


def test_a_pickle_of_a_trainer_is_refused_with_the_way_to_a_clean_copy(stock: Path) -> None:
    (stock / "training_args.bin").write_bytes(b"")

    refused(stock, 3, "is a pickle .* loram doctor ADAPTER --fix OUT")


def test_a_base_whose_config_is_unsound_tells_nothing_of_an_adapter(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", random_factors(WHOLE))
    for config in (tiny_config(hidden_size="x"), tiny_config() | {"model_type": []}):
        assert looks_pruned(adapter, base_config=config) is None
    for base in ("x" * 3_000, "~nobody-has-this-name/x"):
        assert looks_pruned(save_adapter(tmp_path / "b", random_factors(WHOLE), base=base)) is None


def test_a_tokenizer_that_names_code_is_refused(stock: Path) -> None:
    (stock / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')

    refused(stock, 3, "auto_map")


@pytest.mark.parametrize("library", ["transformers", "transformers.models.llama.modeling_llama"])
def test_settings_that_say_nothing_of_the_factors_pass(stock: Path, library: str) -> None:
    edit_config(auto_mapping={"base_model_class": "X", "parent_library": library}, lora_dropout=0.3, someday=False)(
        stock
    )

    assert check_adapter(stock).rank == 4


def test_with_the_base_at_hand_missing_targets_and_other_shapes_are_refused(stock: Path, tmp_path: Path) -> None:
    drop(f"{UP}.lora_A.weight", f"{UP}.lora_B.weight")(stock)
    check_adapter(stock)
    refused(stock, 4, "factors are missing", architecture=ARCHITECTURE)

    larger = save_adapter(tmp_path / "larger", random_factors({UP: (38, 24)}))
    refused(larger, 4, r"shape \(38, 24\), the base model's has \(37, 24\)", architecture=ARCHITECTURE)
    smaller = save_adapter(tmp_path / "smaller", random_factors({UP: (17, 24)}))
    refused(smaller, 4, "has 17 rows, the whole model has 37.*loram recover", architecture=ARCHITECTURE)
    elsewhere = save_adapter(tmp_path / "elsewhere", random_factors({"model.layers.9.mlp.up_proj": (37, 24)}))
    refused(elsewhere, 4, "is no linear layer of this llama model with 4 layers", architecture=ARCHITECTURE)


def edit_record(**changes: Any) -> Callable[[Path], None]:
    """Return an alteration of the record that seals it again, as an attacker would."""

    def edit(folder: Path) -> None:
        from loram_hub.seals import seal

        values = json.loads((folder / RECORD).read_text())
        del values["sha256"]
        (folder / RECORD).write_text(seal(values | changes))

    return edit


@pytest.mark.parametrize(
    ("alter", "exit_code", "match"),
    [
        (edit_record(format=2), 4, "format 2"),
        (edit_record(format=0), 3, "format 0"),
        (edit_record(kind="release"), 3, "kind 'release'"),
        (edit_record(extra=1), 3, "'extra'"),
        (edit_record(base={"id": "org/other", "commit": None, "config_sha256": "0" * 64}), 4, "two adapters"),
        (edit_record(base={"id": 7, "commit": None, "config_sha256": "0" * 64}), 3, "base.id"),
        (edit_record(base=[]), 3, "base in .* an object"),
        (edit_record(release={"id": "x", "commit": None, "plan_sha256": "0"}), 3, "plan_sha256"),
        (edit_record(files={}), 3, "is missing"),
        (edit_record(trained={}), 3, "is missing"),
        (edit_config(lora_dropout=0.1), 3, "its record says"),
        (edit_config(base_model_name_or_path="org/evil"), 4, "names the base"),
        (edit_config(revision="main"), 4, "names the base"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(
    adapter: Path, alter: Callable[[Path], None], exit_code: int, match: str
) -> None:
    alter(adapter)

    refused(adapter, exit_code, match)


def test_a_config_that_recover_does_not_write_is_refused_even_with_its_hash(adapter: Path) -> None:
    from loram_hub.adapter import hash_files

    edit_config(lora_dropout=0.1)(adapter)
    files = {name: {"sha256": file.sha256, "size": file.size} for name, file in hash_files(adapter).items()}
    edit_record(files=files)(adapter)

    refused(adapter, 3, "not in the form that 'loram recover' writes")


def test_config_and_weights_of_another_adapter_are_refused(adapter: Path, tmp_path: Path) -> None:
    plan = half_plan(ARCHITECTURE)
    release = save_metadata_release(tmp_path / "release", tiny_config(), plan)
    trained = save_adapter(tmp_path / "t", random_factors(projections(plan), seed=1), targets=list(SEVEN), base=release)
    recover(trained, tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / WEIGHTS, adapter / WEIGHTS)

    refused(adapter, 3, f"{WEIGHTS} .* its record says")


def test_every_flipped_byte_of_a_recovered_adapter_is_found(adapter: Path) -> None:
    rng = random.Random(0)
    check_adapter(adapter)
    for name in (CONFIG, WEIGHTS, RECORD):
        sound = (adapter / name).read_bytes()
        for _ in range(100):
            position = rng.randrange(len(sound))
            flipped = bytearray(sound)
            flipped[position] ^= rng.randrange(1, 256)
            (adapter / name).write_bytes(flipped)
            with pytest.raises(LoramError) as caught:
                check_adapter(adapter)
            assert caught.value.exit_code in (3, 4)
        (adapter / name).write_bytes(sound)
    check_adapter(adapter)


def test_checking_imports_no_torch_and_opens_no_socket(recovered: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "def refuse(event, args):\n"
        "    assert not event.startswith('socket.'), event\n"
        "sys.addaudithook(refuse)\n"
        "from pathlib import Path\n"
        "from loram_hub.adapter import check_adapter\n"
        f"check_adapter(Path({str(recovered)!r}))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# Pruned adapters.


def test_a_pruned_adapter_is_told_by_its_release_its_base_or_its_uneven_layers(tmp_path: Path, recovered: Path) -> None:
    plan = half_plan(ARCHITECTURE)
    release = save_metadata_release(tmp_path / "release", tiny_config(), plan)
    tensors = random_factors(projections(plan))
    on_release = save_adapter(tmp_path / "a", tensors, base=release)
    on_nothing = save_adapter(tmp_path / "b", tensors)
    one_layer = {module: shape for module, shape in projections(plan).items() if ".layers.1." in module}
    alone = save_adapter(tmp_path / "c", random_factors(one_layer))
    whole = save_adapter(tmp_path / "d", random_factors(WHOLE), base="org/base")

    assert "which is a release" in (looks_pruned(on_release) or "")
    assert "no whole model has" in (looks_pruned(on_nothing) or "")
    assert looks_pruned(alone) is None
    assert "the whole model has" in (looks_pruned(alone, base_config=tiny_config()) or "")
    assert "which is a release" in (looks_pruned(alone, base_config={"model_type": "loram_llama"}) or "")
    assert looks_pruned(whole) is None
    assert looks_pruned(whole, base_config=tiny_config()) is None
    assert looks_pruned(recovered, base_config=tiny_config()) is None


def test_refusing_a_pruned_adapter_says_what_to_run(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", random_factors(projections(half_plan(ARCHITECTURE))))
    (folder / RECORD).write_text(json.dumps({"plan_sha256": "f" * 64}))

    with pytest.raises(UnsupportedAdapterError, match=f"loram recover {folder} OUT"):
        refuse_pruned(folder)
    with pytest.raises(IncompatibleError, match="loram recover"):
        check_adapter(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_valid_adapters_of_every_type_pass(tmp_path: Path, dtype: Any) -> None:
    folder = save_adapter(tmp_path / "a", random_factors(WHOLE, dtype=dtype), targets=list(SEVEN))

    assert len(check_adapter(folder, architecture=ARCHITECTURE).modules) == 28
