"""A pruned adapter is never taken for a recovered one: stock PEFT marks it, and everything of ours reads the mark.

What servers make of the mark is shown with a real one in tests/serving.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import SEVEN, projections, random_factors, save_adapter, save_base, tiny_architecture, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from loram_hub.adapter import MARK, WEIGHTS, check_adapter, looks_pruned
from loram_hub.auto import AutoLoramModel
from loram_hub.doctor import examine
from loram_hub.errors import InvalidRequestError, PlanMismatchError, UnsupportedAdapterError, VerificationError
from loram_hub.inspection import verify
from loram_hub.merging import merge
from loram_hub.pruning import prune
from loram_hub.pushing import push_adapter
from loram_hub.recovery import recover

IDS = torch.arange(4, 16)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base and two releases of it with different plans of equal shapes."""
    folder = tmp_path_factory.mktemp("mark")
    base = save_base(folder / "base", tiny_config())
    for name, seed in (("release", 0), ("other", 1)):
        prune(base, folder / name, pruning_ratio=0.5, importance="random", keep_first=1, keep_last=1, seed=seed)
    return folder


def opened(folders: Path, name: str = "release") -> PreTrainedModel:
    return AutoLoramModel.from_pretrained(folders / name, dtype=torch.float32)


def tuned(folders: Path, name: str = "release", **changes: Any) -> PeftModel:
    """Open a release with an adapter of random factors, as after training."""
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": list(SEVEN), "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(opened(folders, name), LoraConfig(**(settings | changes)))


def saved(folders: Path, target: Path, **changes: Any) -> Path:
    """Save an adapter as stock PEFT does."""
    tuned(folders, **changes).save_pretrained(str(target))
    return target


def marks(folder: Path) -> list[tuple[str, str]]:
    """Names of the marked layers in an adapter folder, and the plans that they name."""
    tensors = load_file(folder / "adapter_model.safetensors")
    ours = {name: values for name, values in tensors.items() if MARK in name}
    return [(name.removesuffix(f".loram_mark.{MARK}"), values.tobytes().hex()) for name, values in ours.items()]


def without_mark(folder: Path) -> Path:
    """Take the mark away, as if the adapter had been saved without this library."""
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: values for name, values in tensors.items() if MARK not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


# Where the mark is.


def test_what_stock_peft_saves_from_a_release_carries_the_digest_of_its_plan(folders: Path, tmp_path: Path) -> None:
    model = tuned(folders)
    model.save_pretrained(str(tmp_path))

    plan = opened(folders).loram.plan.digest
    assert marks(tmp_path) == [("base_model.model.model.layers.0.self_attn.q_proj", plan)]


def test_each_of_several_adapters_is_marked_on_the_first_layer_that_it_adapts(folders: Path, tmp_path: Path) -> None:
    model = tuned(folders)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[1, 2]))

    model.save_pretrained(str(tmp_path))

    assert [layer for layer, _ in marks(tmp_path)] == ["base_model.model.model.layers.0.self_attn.q_proj"]
    assert [layer for layer, _ in marks(tmp_path / "second")] == ["base_model.model.model.layers.1.mlp.down_proj"]
    model.delete_adapter("second")
    assert not any(MARK in name for name in model.get_base_model().model.layers[1].state_dict())
    assert sum(MARK in name for name in model.state_dict()) == 1


def test_nothing_is_marked_but_adapters_on_a_release(folders: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=list(SEVEN))).save_pretrained(str(tmp_path / "on-base"))
    opened(folders).save_pretrained(tmp_path / "release")
    merged = tuned(folders).merge_and_unload()

    assert marks(tmp_path / "on-base") == []
    assert verify(tmp_path / "release").kind == "release"
    assert not any(MARK in name for name in [*load_file(tmp_path / "release/model.safetensors"), *merged.state_dict()])


def test_the_mark_is_no_parameter_and_no_buffer(folders: Path) -> None:
    model = tuned(folders)
    before = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]

    assert any(MARK in name for name in model.state_dict())

    assert [name for name, _ in (*model.named_parameters(), *model.named_buffers())] == before
    assert {tensor.dtype for name, tensor in model.to(torch.bfloat16).state_dict().items() if MARK in name} == {
        torch.uint8
    }


# It disturbs nobody.


def test_a_marked_adapter_opens_on_its_release_with_all_keys_matched(folders: Path, tmp_path: Path) -> None:
    model = tuned(folders)
    model.save_pretrained(str(tmp_path))

    again = PeftModel.from_pretrained(opened(folders), str(tmp_path))
    result = again.load_adapter(str(tmp_path), "second", is_trainable=True)

    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(logits(again), logits(model))
    fresh = tuned(folders)
    fresh.load_state_dict(model.state_dict())  # strict
    assert torch.equal(logits(fresh), logits(model))


def test_an_adapter_without_a_mark_opens_as_well(folders: Path, tmp_path: Path) -> None:
    folder = without_mark(saved(folders, tmp_path))

    result = tuned(folders).load_adapter(str(folder), "default")

    assert (result.missing_keys, result.unexpected_keys) == ([], [])


def test_transformers_own_adapter_methods_read_and_write_the_mark(folders: Path, tmp_path: Path) -> None:
    model = opened(folders)
    model.add_adapter(LoraConfig(r=2, target_modules=list(SEVEN), init_lora_weights=False))
    assert sum(MARK in name for name in model.get_adapter_state_dict()) == 1
    model.save_pretrained(tmp_path / "own")
    folder = saved(folders, tmp_path / "pefts")

    again = opened(folders)
    again.load_adapter(str(folder))

    assert [path.name for path in (tmp_path / "own").glob("*.safetensors")] == [WEIGHTS]
    assert marks(tmp_path / "own") == marks(folder)
    assert recover(tmp_path / "own", tmp_path / "recovered").rank == 2
    assert torch.equal(logits(again), logits(PeftModel.from_pretrained(opened(folders), str(folder))))


def test_pefts_hot_swapping_swaps_the_mark_as_well(folders: Path, tmp_path: Path) -> None:
    for name, scale in (("first", 8), ("second", 16)):
        saved(folders, tmp_path / name, lora_alpha=scale)
    saved(folders, tmp_path / "none")
    without_mark(tmp_path / "none")
    model = PeftModel.from_pretrained(opened(folders), str(tmp_path / "first"))
    own = [("base_model.model.model.layers.0.self_attn.q_proj", opened(folders).loram.plan.digest)]
    tuned(folders, name="other").save_pretrained(str(tmp_path / "foreign"))

    for name in ("foreign", "none", "second"):
        hotswap_adapter(model, str(tmp_path / name), adapter_name="default")
        model.save_pretrained(str(tmp_path / "again" / name))
        assert marks(tmp_path / "again" / name) == (marks(tmp_path / "foreign") if name == "foreign" else own)

    expected = PeftModel.from_pretrained(opened(folders), str(tmp_path / "second"))
    assert torch.equal(logits(model), logits(expected))


def test_pefts_hot_swapping_refuses_an_adapter_that_begins_at_another_layer(folders: Path, tmp_path: Path) -> None:
    saved(folders, tmp_path / "later", layers_to_transform=[1, 2])

    with pytest.raises(RuntimeError, match=f"unexpected keys found.*{MARK}"):
        hotswap_adapter(tuned(folders), str(tmp_path / "later"), adapter_name="default")


def test_torch_distributed_takes_and_sets_a_state_dict_with_marks(folders: Path) -> None:
    model = tuned(folders)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)

    state = get_model_state_dict(model, options=options)
    result = set_model_state_dict(tuned(folders), state, options=StateDictOptions(strict=False))

    assert sum(MARK in name for name in state) == 1
    assert result.unexpected_keys == []


def test_a_model_on_meta_has_no_mark_to_distribute(folders: Path) -> None:
    model = tuned(folders)
    assert any(MARK in name for name in model.state_dict())

    assert not any(MARK in name for name in model.to("meta").state_dict())


# Recovery reads it, and drops it.


def test_recovery_drops_the_mark_and_everything_takes_what_comes_out(folders: Path, tmp_path: Path) -> None:
    folder = saved(folders, tmp_path / "pruned")

    recovered = recover(folder, tmp_path / "recovered").folder

    assert marks(recovered) == []
    assert looks_pruned(recovered) is None
    assert check_adapter(recovered, architecture=tiny_architecture()).kind == "recovered adapter"
    assert examine(recovered, "vllm", base=folders / "base").verdict == "serves"
    assert merge(folders / "base", recovered, tmp_path / "merged").merged == 7 * 4


def test_recovery_with_and_without_the_mark_and_live_gives_the_same_bytes(folders: Path, tmp_path: Path) -> None:
    model = tuned(folders)
    model.save_pretrained(str(tmp_path / "pruned"))

    recover(model, tmp_path / "live")
    recover(tmp_path / "pruned", tmp_path / "marked")
    recover(without_mark(tmp_path / "pruned"), tmp_path / "unmarked")

    found = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("live", "marked", "unmarked")]
    assert found[0] == found[1] == found[2]


def test_the_mark_tells_apart_two_releases_whose_shapes_are_equal(folders: Path, tmp_path: Path) -> None:
    folder = saved(folders, tmp_path / "pruned")
    config = json.loads((folder / "adapter_config.json").read_text())
    gone = json.dumps(config | {"base_model_name_or_path": None})  # stock PEFT names the release by a name at most
    (folder / "adapter_config.json").write_text(gone)

    with pytest.raises(PlanMismatchError, match="other channel groups"):
        recover(folder, tmp_path / "out", release=folders / "other")
    assert recover(folder, tmp_path / "out", release=folders / "release").base_id == "base"


def test_an_adapter_that_moves_to_another_release_keeps_its_mark_and_is_warned_of(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(folders, tmp_path / "pruned")

    model = PeftModel.from_pretrained(opened(folders, "other"), str(folder))
    model.save_pretrained(str(tmp_path / "again"))

    assert "this one has plan" in caplog.text
    assert marks(tmp_path / "again") == marks(folder)
    with pytest.raises(PlanMismatchError, match="other channel groups"):
        recover(model, tmp_path / "out")


def test_a_new_adapter_does_not_get_the_mark_of_a_deleted_one_of_its_name(folders: Path, tmp_path: Path) -> None:
    tuned(folders, name="other").save_pretrained(str(tmp_path / "foreign"))
    model = PeftModel.from_pretrained(opened(folders), str(tmp_path / "foreign"))
    config = LoraConfig(r=2, target_modules=list(SEVEN), task_type="CAUSAL_LM")
    model.add_adapter("another", config)
    copy = pickle.loads(pickle.dumps(model))

    model.set_adapter("another")
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.save_pretrained(str(tmp_path / "new"), selected_adapters=["default"])
    copy.save_pretrained(str(tmp_path / "old"), selected_adapters=["default"])

    assert [plan for _, plan in marks(tmp_path / "new")] == [opened(folders).loram.plan.digest]
    assert marks(tmp_path / "old") == marks(tmp_path / "foreign")
    assert recover(tmp_path / "new", tmp_path / "out", release=folders / "release").rank == 2


def test_no_mark_is_written_by_pefts_conversion_of_an_olora_adapter_but_its_shapes_tell(
    folders: Path, tmp_path: Path
) -> None:
    model = tuned(folders, init_lora_weights="olora")
    model.peft_config["default"].init_lora_weights = True  # as PEFT wants it for this step
    model.save_pretrained(str(tmp_path / "initial"))
    model.peft_config["default"].init_lora_weights = "olora"

    with pytest.warns(UserWarning, match="OLoRA changes the base weights"):
        model.save_pretrained(
            str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )

    assert marks(tmp_path / "initial") != []
    assert marks(tmp_path / "converted") == []
    assert examine(tmp_path / "converted", "vllm", base=folders / "base").findings[0].rule == "pruned"
    assert recover(tmp_path / "converted", tmp_path / "recovered").rank == 4


def test_a_mark_that_was_cast_with_the_factors_is_refused_by_its_release(folders: Path, tmp_path: Path) -> None:
    folder = saved(folders, tmp_path)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_torch_file(folder / WEIGHTS).items()}
    save_torch_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    with pytest.raises(VerificationError, match=r"bfloat16 of shape \(32,\); the mark .* 32 bytes"):
        PeftModel.from_pretrained(opened(folders), str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.update({name: np.zeros(31, np.uint8)}), "32 bytes"),
        (lambda tensors, name: tensors.update({name: np.zeros(32, np.float32)}), "32 bytes"),
        (lambda tensors, name: tensors.update({f"x.{MARK}": np.zeros(32, np.uint8)}), "different plans"),
    ],
    ids=["short", "no-bytes", "two"],
)
def test_a_mark_that_is_none_is_refused(
    folders: Path, tmp_path: Path, change: Callable[[dict[str, Any], str], None], message: str
) -> None:
    folder = saved(folders, tmp_path / "pruned")
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors, next(name for name in tensors if MARK in name))
    save_file(tensors, folder / "adapter_model.safetensors")

    with pytest.raises(VerificationError, match=message):
        recover(folder, tmp_path / "out")


# Everything else of ours refuses it, with what to run. Here nothing but the mark tells: the shapes are the base's own.


@pytest.fixture
def marked(folders: Path, tmp_path: Path) -> Path:
    """An adapter of the layers that the release left whole, whose config names the base."""
    folder = saved(folders, tmp_path / "pruned", layers_to_transform=[0, 3], target_modules=["q_proj", "up_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folders / "base")}))
    return folder


def test_every_command_that_needs_a_recovered_adapter_refuses_the_mark(
    folders: Path, tmp_path: Path, marked: Path
) -> None:
    base = folders / "base"

    assert looks_pruned(marked) == "it carries the mark of one"
    for refusing in (
        lambda: verify(marked, base=base),
        lambda: merge(base, marked, tmp_path / "merged"),
        lambda: push_adapter(marked, "org/adapter", dry_run=True),
    ):
        with pytest.raises((UnsupportedAdapterError, PlanMismatchError, InvalidRequestError), match="loram recover"):
            refusing()
    assert not (tmp_path / "merged").exists()
    assert merge(base, without_mark(marked), tmp_path / "merged").merged == 4


@pytest.mark.parametrize("target", ["vllm", "sglang", "llamacpp", "peft"])
def test_the_doctor_says_recover_it_first(folders: Path, marked: Path, target: Any) -> None:
    diagnosis = examine(marked, target, base=folders / "base")

    assert [finding.rule for finding in diagnosis.findings if finding.severity == "refused"] == ["pruned-marked"]
    assert "loram recover" in diagnosis.findings[0].remedy
    assert diagnosis.command is None


def test_an_adapter_that_is_pruned_by_its_shapes_alone_is_still_told_so(folders: Path, tmp_path: Path) -> None:
    plan = opened(folders).loram.plan
    folder = save_adapter(tmp_path / "adapter", random_factors(projections(plan)), base="org/base")

    assert examine(folder, "vllm").findings[0].rule == "pruned"
