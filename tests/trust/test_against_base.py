"""Releases and adapters against their base model: what hashes and plans cannot tell, the base's own bytes do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_client
import numpy as np
import pytest
import torch
from builders import save_base, tiny_config
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from trust.alterations import CHANNELS, GATE, Alter, config, manifest, masks, sealed, tensors
from trust.subjects import STRUCTURE, build_subjects, save_peft_adapter

from loram_hub.auto import AutoLoramModel
from loram_hub.errors import IncompatibleError, InvalidRequestError, VerificationError
from loram_hub.files import sha256_of
from loram_hub.inspection import verify
from loram_hub.manifest import MANIFEST
from loram_hub.pruning import prune
from loram_hub.release import open_metadata

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subjects")
    build_subjects(folder)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target / "copy")
    return target / "copy"


def keep_another_channel(arrays: dict[str, np.ndarray]) -> None:  # type: ignore[type-arg]
    """Claim that the weights of a kept channel are those of one that was pruned."""
    kept = set(arrays[CHANNELS].tolist())
    pruned = min(set(range(37)) - kept)
    arrays[CHANNELS] = np.array(sorted({*list(kept)[1:], pruned}), dtype=np.int32)


@pytest.mark.parametrize(
    "alter",
    [
        sealed(tensors(lambda found: found[GATE].__setitem__((3, 5), 0.25))),
        sealed(tensors(lambda found: found["model.embed_tokens.weight"].__setitem__((52, 23), 0.25))),
        sealed(tensors(lambda found: found["model.norm.weight"].__setitem__(0, 2.0))),
        sealed(tensors(lambda found: found["model.layers.2.self_attn.o_proj.weight"].mul_(-1))),
        sealed(tensors(lambda found: found.update({GATE: found[GATE].flip(0)}))),
        masks(keep_another_channel),
    ],
    ids=["one weight", "one of the embedding", "a norm", "signs", "rows exchanged", "indices rearranged"],
)
def test_what_only_the_base_can_tell_is_found_by_a_full_comparison(
    subjects: Path, alter: Alter, tmp_path: Path
) -> None:
    folder = copy_of(subjects / "bf16", tmp_path)
    alter(folder)

    verify(folder, base=subjects / "base")
    with pytest.raises(VerificationError, match=r"is not what .* has at the kept positions"):
        verify(folder, full=True, base=subjects / "base")


def test_a_full_comparison_says_how_much_was_compared(subjects: Path) -> None:
    found = verify(subjects / "bf16", full=True, base=subjects / "base")

    nbytes = sum(tensor.nbytes for tensor in load_file(subjects / "bf16" / "model.safetensors").values())
    assert f"{nbytes:,} bytes of kept weights" in found.checked[-1]
    assert not any("--full" in gap or "--base" in gap for gap in found.not_checked)


def test_a_base_of_another_state_is_refused(subjects: Path, tmp_path: Path) -> None:
    other = copy_of(subjects / "base", tmp_path)
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | {"rope_theta": 5.0}))

    for full in (False, True):
        with pytest.raises(IncompatibleError, match="the release was pruned from a base with"):
            verify(subjects / "bf16", full=full, base=other)
    with pytest.raises(IncompatibleError, match="was made for a base whose config"):
        verify(subjects / "recovered", base=other)


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 0.5},
        {"hidden_act": "relu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}},
        {"eos_token_id": 7},
        {"max_position_embeddings": 65},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_that_says_other_things_than_the_bases_is_refused(
    subjects: Path, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = copy_of(subjects / "bf16", tmp_path)
    config(**changes)(folder)

    verify(folder)
    for full in (False, True):
        with pytest.raises(IncompatibleError, match=f"for {next(iter(changes))}, the base's has"):
            verify(folder, full=full, base=subjects / "base")


def test_a_saved_model_may_differ_from_its_base_as_trainers_have_it_and_no_further(
    subjects: Path, tmp_path: Path
) -> None:
    model = AutoLoramModel.from_pretrained(subjects / "bf16")
    model.config.pad_token_id, model.config.use_cache = 3, False
    model.save_pretrained(tmp_path / "saved")

    found = verify(tmp_path / "saved", base=subjects / "base")
    assert any("tokenizer" in gap for gap in found.not_checked)
    config(rms_norm_eps=0.5)(tmp_path / "saved")
    with pytest.raises(IncompatibleError, match=r"0\.5 for rms_norm_eps"):
        verify(tmp_path / "saved", base=subjects / "base")


def test_it_says_what_of_the_base_was_compared(subjects: Path) -> None:
    found = verify(subjects / "bf16", base=subjects / "base")

    assert "the base's config" in found.checked[-1]
    assert "commit" not in found.checked[-1]  # it was pruned from a folder, which has none
    assert not any("NF4" in phrase for phrase in found.checked)
    assert any("NF4" in phrase for phrase in verify(subjects / "nf4").checked)


def test_what_transformers_cannot_build_is_incompatible(subjects: Path, tmp_path: Path) -> None:
    folder = copy_of(subjects / "bf16", tmp_path)
    config(rope_parameters={"rope_type": "yarn", "rope_theta": 3.0})(folder)  # without its factor

    verify(folder)
    with pytest.raises(IncompatibleError, match="transformers cannot build a model"):
        AutoLoramModel.from_pretrained(folder)


def test_a_base_in_another_type_cannot_be_compared(subjects: Path, tmp_path: Path) -> None:
    other = copy_of(subjects / "base", tmp_path)
    whole = {name: tensor.float() for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(whole, other / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(InvalidRequestError, match=r"is F32 in .* and BF16 in the release"):
        verify(subjects / "bf16", full=True, base=other)


def test_a_base_with_other_shapes_is_refused(subjects: Path, tmp_path: Path) -> None:
    other = copy_of(subjects / "base", tmp_path)
    larger = save_base(tmp_path / "larger", tiny_config(intermediate_size=41), dtype="bfloat16")
    shutil.copyfile(larger / "model.safetensors", other / "model.safetensors")

    with pytest.raises(IncompatibleError, match=r"has shape \(24, 41\) for .*; the release's base has \(24, 37\)"):
        verify(subjects / "bf16", full=True, base=other)


def saved(subjects: Path, target: Path) -> Path:
    AutoLoramModel.from_pretrained(subjects / "bf16", dtype=torch.bfloat16).save_pretrained(target / "saved")
    return target / "saved"


def aligned(subjects: Path, target: Path) -> Path:
    folder = copy_of(subjects / "bf16", target)
    manifest(lambda values: values.update(alignment={"steps": 200}))(folder)
    return folder


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda subjects, _: subjects / "nf4", "is NF4"),
        (saved, "was saved from memory"),
        (aligned, "was aligned"),
        (lambda subjects, _: subjects / "recovered", "is an adapter"),
    ],
)
def test_weights_that_are_not_the_bases_own_are_not_compared(
    subjects: Path, made: Callable[[Path, Path], Path], why: str, tmp_path: Path
) -> None:
    folder = made(subjects, tmp_path)

    verify(folder)
    with pytest.raises(InvalidRequestError, match=why):
        verify(folder, full=True, base=subjects / "base")


def test_a_local_base_has_to_be_named(subjects: Path) -> None:
    with pytest.raises(
        InvalidRequestError, match="was pruned from a local folder, 'base'; say where it is with --base"
    ):
        verify(subjects / "bf16", full=True)


# -- on the Hub -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(subjects: Path) -> Iterator[HubServer]:
    """A Hub with a base, a release pruned from it there, and adapters for it."""
    with HubServer(subjects / "hub") as server:
        commit = server.add_repo("org/base", subjects / "base")
        release = prune(subjects / "base", subjects / "published", **STRUCTURE)
        named = json.loads((release.folder / MANIFEST).read_text())["base"] | {"id": "org/base", "commit": commit}
        manifest(lambda values: values.update(base=named))(release.folder)
        server.add_repo("org/release", release.folder)
        save_peft_adapter(subjects / "stock", subjects / "base")
        config = json.loads((subjects / "stock" / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": "org/base", "revision": commit}
        (subjects / "stock" / "adapter_config.json").write_text(json.dumps(config))
        server.add_repo("org/adapter", subjects / "stock")
        yield server


def test_a_release_is_verified_by_its_id_against_the_base_it_names(hub: HubServer, tmp_path: Path) -> None:
    run = hub_client.loram(hub, tmp_path, "verify", "org/release", "--full", "--json")

    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["kind"], found["id"], found["intact"]) == ("release", "org/release", True)
    assert len(found["commit"]) == 40
    assert "bit by bit" in found["checked"][-1]


def test_an_adapter_is_verified_by_its_id_against_the_base_it_names(hub: HubServer, tmp_path: Path) -> None:
    run = hub_client.loram(hub, tmp_path, "verify", "org/adapter", "--json")

    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["kind"], found["id"]) == ("PEFT adapter", "org/adapter")
    assert "modules and shapes against the base model's config" in found["checked"]
    assert not list((tmp_path).rglob("models--org--base/**/model.safetensors"))


def test_a_base_that_moved_on_is_another_one(hub: HubServer, subjects: Path, tmp_path: Path) -> None:
    moved = copy_of(subjects / "base", tmp_path)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    hub.add_repo("org/moved", moved)

    run = hub_client.loram(hub, tmp_path / "home", "verify", "org/release", "--base", "org/moved")

    assert run.returncode == 4
    assert "the release was pruned from a base with" in run.stderr


def test_the_manifest_names_the_config_that_was_pruned(subjects: Path) -> None:
    assert open_metadata(subjects / "bf16").manifest.base.config_sha256 == sha256_of(subjects / "base" / "config.json")
