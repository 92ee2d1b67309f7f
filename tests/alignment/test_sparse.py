"""Alignment of sparse releases: the zeros stay, and the rest is trained as a plain loop with masked gradients does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from alignment.materials import SETTINGS, save_corpora, save_sparse_release
from safetensors.torch import load_file
from torch import nn

from loram_hub import AutoLoramModel, refit
from loram_hub.alignment import AlignmentSettings, align, check_align
from loram_hub.alignment.estimates import estimate
from loram_hub.alignment.launch import joined_ranks
from loram_hub.alignment.masking import gradient_masks
from loram_hub.alignment.model import sharded_model
from loram_hub.corpora import Corpus, PackedStream
from loram_hub.errors import InvalidRequestError
from loram_hub.masks import WEIGHT_MASKS
from loram_hub.release import Release, open_release, verify
from loram_hub.teaching import TeachingSettings, teach

STEPS = {"steps": 4, "warmup_steps": 1, "held_out": 1, "evaluate_every": 4}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sparse_release(tmp_path_factory.mktemp("sparse"))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    return save_corpora(tmp_path_factory.mktemp("corpora"))


def settings(**changes: Any) -> AlignmentSettings:
    return AlignmentSettings(**{**SETTINGS, **STEPS, **changes})


def masks_of(release: Path) -> dict[str, torch.Tensor]:
    masks = open_release(release).weight_masks
    assert masks is not None
    found = {name: torch.from_numpy(masks.read(name)) for name in masks.names}
    assert len(found) == 4 * 7
    return found


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def records_of(out: Path) -> list[dict[str, Any]]:
    lines = (out.with_name(f"{out.name}-run") / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["step"]]


class PlainRun:
    """What anyone would write: the stock model's own loss, gradients times masks, clipping, torch's AdamW."""

    def __init__(self, release: Path, corpora: list[Corpus], asked: AlignmentSettings) -> None:
        model, masks = AutoLoramModel.from_pretrained(release, dtype=torch.float32), masks_of(release)
        stream = PackedStream(
            corpora,
            transformers.PreTrainedTokenizerFast.from_pretrained(release),
            sequence_length=asked.sequence_length,
            seed=asked.seed,
            held_out=asked.held_out,
            shuffle_window=asked.shuffle_window,
        )
        matrices = [each for each in model.parameters() if each.ndim >= 2]
        vectors = [each for each in model.parameters() if each.ndim < 2]
        groups = [{"params": matrices, "weight_decay": asked.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=asked.learning_rate)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, asked.warmup_steps, asked.steps)
        self.losses, self.norms = list[float](), list[float]()
        for _ in range(asked.steps):
            ids = torch.tensor(np.stack([next(stream).ids for _ in range(asked.batch_size)]), dtype=torch.int64)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            for name, mask in masks.items():
                parameter = model.get_parameter(name)
                assert parameter.grad is not None
                parameter.grad *= mask
            self.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), asked.max_grad_norm)))
            self.losses.append(float(loss.detach()))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_zeros_are_kept(made: Release, source: Path) -> None:
    before, after = weights_of(source), weights_of(made.folder)
    for name, mask in masks_of(source).items():
        assert not after[name][~mask].any(), name
        assert (after[name] != before[name])[mask].float().mean() > 0.5, name
    assert (made.folder / WEIGHT_MASKS).read_bytes() == (source / WEIGHT_MASKS).read_bytes()
    assert made.plan.digest == open_release(source).plan.digest
    verify(made.folder)


def test_training_is_what_a_plain_loop_with_masked_gradients_computes(
    release: Path, corpora: list[Corpus], tmp_path: Path
) -> None:
    asked = settings(weight_decay=0.1, max_grad_norm=0.5)
    plain = PlainRun(release, corpora, asked)

    made = align(release, tmp_path / "out", corpora=corpora, settings=asked)

    records = records_of(tmp_path / "out")
    assert [record["loss"] for record in records] == pytest.approx(plain.losses, rel=1e-5)
    assert [record["gradient_norm"] for record in records] == pytest.approx(plain.norms, rel=1e-4)
    assert min(plain.norms) > 0.5  # so that what the norm is of decides over the steps
    for name, values in weights_of(made.folder).items():
        # Adam divides by the root of a mean square: elements with tiny gradients differ by up to a step or so.
        assert torch.allclose(values, plain.weights[name], atol=2e-3), name
    assert_zeros_are_kept(made, release)
    assert made.manifest.parameters == open_release(release).manifest.parameters


def test_a_teacher_and_frozen_embeddings_join_in(release: Path, corpora: list[Corpus], tmp_path: Path) -> None:
    asked = settings(distillation=0.5, trainable="no-embeddings", activation_checkpointing=True, micro_batch_size=3)
    teaching = TeachingSettings(
        sequences=asked.steps * asked.batch_size,
        sequence_length=asked.sequence_length,
        k=4,
        held_out=asked.held_out,
        shuffle_window=asked.shuffle_window,
    )
    teach(release.parent / "base", tmp_path / "teacher", corpora=corpora, settings=teaching)

    made = align(release, tmp_path / "out", corpora=corpora, settings=asked, teacher=tmp_path / "teacher")

    assert_zeros_are_kept(made, release)
    assert all(record["divergence"] > 0 for record in records_of(tmp_path / "out"))


def test_a_process_holds_a_bit_per_weight_as_estimated(release: Path, corpora: list[Corpus], tmp_path: Path) -> None:
    source = open_release(release)
    with joined_ranks(processes=None, device="cpu") as ranks:
        model = sharded_model(source, settings(), ranks, precision="fp32")
        held = sum(kept.bits.nbytes for kept in gradient_masks(source, model, ranks).kept.values())

    told = check_align(release, tmp_path / "out", corpora=corpora, settings=settings())

    weights = sum(mask.numel() for mask in masks_of(release).values())
    assert told.mask_bytes == held
    assert weights / 8 <= held < weights / 6  # rows of 24, 37 and 60 columns end within a byte
    assert told.process_bytes > told.weight_bytes + told.gradient_bytes + told.optimizer_bytes + held
    alone = estimate(source.plan, settings(), precision="fp32", processes=2)
    assert alone.mask_bytes == pytest.approx(held / 2, rel=0.05)


def test_a_refit_is_refused_where_single_weights_were_removed(release: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"lost single weights \(by magnitude\).*fill the gaps.*sparsegpt"):
        refit(release, tmp_path / "out", calibration=torch.ones(2, 8, dtype=torch.int64))
    assert not (tmp_path / "out").exists()
