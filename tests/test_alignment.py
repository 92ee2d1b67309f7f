"""Alignment in one process: against a plain loop in torch, and what it does with what it cannot do."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from alignment.materials import SETTINGS, TOKENS, save_corpora, save_release, save_texts
from builders import MODEL_TYPES, save_base, save_tokenizer, tiny_config
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import distribute_tensor

from loram_hub import AutoLoramModel, quantize
from loram_hub.alignment import AlignmentSettings, align, check_align, requests
from loram_hub.alignment.curves import draw_curves
from loram_hub.alignment.estimates import estimate
from loram_hub.alignment.launch import (
    LAUNCHED_BY,
    Launch,
    check_precision,
    end_with_launcher,
    joined_ranks,
    read_launch,
)
from loram_hub.alignment.model import TrainedModel, local_of, sharded_model
from loram_hub.alignment.objective import token_losses
from loram_hub.alignment.optimization import ShardedAdamW, learning_rate_at
from loram_hub.alignment.runs import RunFolder
from loram_hub.architecture import Indices, Space, architecture_of
from loram_hub.auto import model_on_meta
from loram_hub.corpora import Corpus, PackedStream
from loram_hub.errors import (
    IncompatibleError,
    InvalidRequestError,
    LoramError,
    ResourceError,
    TrainingError,
    VerificationError,
)
from loram_hub.files import dump_json
from loram_hub.plan import Plan, PruningSettings, planned_sizes
from loram_hub.release import Release, open_release, verify
from loram_hub.teaching import TeacherShards, TeachingSettings, teach
from loram_hub.teaching.records import TeacherRecord, write_finished


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_release(tmp_path_factory.mktemp("pruned"))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    return save_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def plain(release: Path, corpora: list[Corpus]) -> PlainRun:
    return PlainRun(release, corpora, settings(weight_decay=0.1))


def settings(**changes: Any) -> AlignmentSettings:
    return AlignmentSettings(**{**SETTINGS, **changes})


def log_of(out: Path) -> list[dict[str, Any]]:
    lines = (out.with_name(f"{out.name}-run") / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses_of(out: Path) -> list[float]:
    return [record["loss"] for record in log_of(out) if record["step"]]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    assert found
    return found


def aligned(release: Path, out: Path, corpora: list[Corpus], **others: Any) -> Release:
    changes = {key: others.pop(key) for key in [*others] if key in AlignmentSettings.__dataclass_fields__}
    return align(release, out, corpora=corpora, settings=settings(**changes), **others)


def training_stream(release: Path, corpora: list[Corpus], asked: AlignmentSettings) -> PackedStream:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(release)
    return PackedStream(
        corpora,
        tokenizer,
        sequence_length=asked.sequence_length,
        seed=asked.seed,
        held_out=asked.held_out,
        shuffle_window=asked.shuffle_window,
    )


class PlainRun:
    """What anyone would write: the stock model's own loss, torch's AdamW, transformers' schedule."""

    def __init__(self, release: Path, corpora: list[Corpus], asked: AlignmentSettings) -> None:
        model = AutoLoramModel.from_pretrained(release, dtype=torch.float32)
        stream = training_stream(release, corpora, asked)
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": asked.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=asked.learning_rate,
        )
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, asked.warmup_steps, asked.steps)
        held_out = [torch.tensor(ids, dtype=torch.int64) for ids in stream.held_out]
        self.losses, self.norms, self.rates = list[float](), list[float](), list[float]()
        self.before = [self._loss(model, ids) for ids in held_out]
        for _ in range(asked.steps):
            ids = torch.tensor(np.stack([next(stream).ids for _ in range(asked.batch_size)]), dtype=torch.int64)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), asked.max_grad_norm)
            self.rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            self.losses.append(float(loss.detach()))
            self.norms.append(float(norm))
        self.after = [self._loss(model, ids) for ids in held_out]
        self.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    @staticmethod
    def _loss(model: nn.Module, ids: torch.Tensor) -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)


def test_training_is_what_a_plain_loop_computes(
    release: Path, corpora: list[Corpus], plain: PlainRun, tmp_path: Path
) -> None:
    made = aligned(release, tmp_path / "out", corpora, weight_decay=0.1)

    records = [record for record in log_of(tmp_path / "out") if record["step"]]
    assert [record["loss"] for record in records] == pytest.approx(plain.losses, rel=1e-5)
    assert [record["gradient_norm"] for record in records] == pytest.approx(plain.norms, rel=1e-4)
    assert [record["learning_rate"] for record in records] == pytest.approx(plain.rates, rel=1e-12)
    assert made.manifest.alignment is not None
    held_out = made.manifest.alignment["held_out"]
    assert list(held_out[0][1].values()) == pytest.approx(plain.before, rel=1e-5)
    assert list(held_out[-1][1].values()) == pytest.approx(plain.after, rel=1e-4)
    found = weights_of(made.folder)
    assert set(found) == set(plain.weights)
    for name, values in plain.weights.items():
        # Adam divides by the root of a mean square: elements with tiny gradients differ by up to a step or so.
        assert torch.allclose(found[name], values, atol=2e-3), name


def test_the_loss_falls_on_held_out_texts(release: Path, corpora: list[Corpus], tmp_path: Path) -> None:
    made = aligned(release, tmp_path / "out", corpora, steps=30)

    assert made.manifest.alignment is not None
    (_, before), *_, (_, after) = made.manifest.alignment["held_out"]
    assert set(before) == {"steps.jsonl", "strides.jsonl"}
    for name, loss in before.items():
        assert after[name] < 0.85 * loss


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 3, "loss_chunk": 7},
        {"micro_batch_size": 2, "activation_checkpointing": True},
    ],
    ids=str,
)
def test_how_a_step_is_computed_does_not_change_it(
    release: Path, corpora: list[Corpus], plain: PlainRun, tmp_path: Path, changes: dict[str, Any]
) -> None:
    aligned(release, tmp_path / "out", corpora, weight_decay=0.1, **changes)

    assert losses_of(tmp_path / "out") == pytest.approx(plain.losses, rel=1e-5)


# torch._dynamo looks at `.grad` of everything, and hides the warning only outside of pytest.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_trains_alike(
    release: Path, corpora: list[Corpus], plain: PlainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile

    def without_compiler(model: Callable[..., Any], **arguments: Any) -> Any:
        return compile_(model, backend="eager", **arguments)  # all but the compiler, which takes a minute

    monkeypatch.setattr(torch, "compile", without_compiler)
    aligned(release, tmp_path / "out", corpora, weight_decay=0.1, compile=True)

    assert losses_of(tmp_path / "out") == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("mixed", 0.03), ("bf16", 0.05)])
def test_bf16_comes_close(
    release: Path, corpora: list[Corpus], plain: PlainRun, tmp_path: Path, precision: str, tolerance: float
) -> None:
    aligned(release, tmp_path / "out", corpora, weight_decay=0.1, precision=precision)

    found = losses_of(tmp_path / "out")
    assert found == pytest.approx(plain.losses, rel=tolerance)
    assert found != pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_loss_in_chunks_is_the_model_s_own_with_its_gradients(model_type: str, tmp_path: Path) -> None:
    opened = open_release(save_release(tmp_path, model_type, has_tokenizer=False))
    stock = AutoLoramModel.from_pretrained(opened.folder, dtype=torch.float32)
    ids = torch.randint(4, 53, (3, 11), generator=torch.Generator().manual_seed(0))
    stock(input_ids=ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in stock.named_parameters()}
    model = TrainedModel(copy.deepcopy(stock), loss_chunk=7)
    model.zero_grad()

    losses, divergences = model(ids)
    (losses.sum() / (3 * 10)).backward()

    assert divergences is None
    with torch.no_grad():
        own = [float(stock(input_ids=row[None], labels=row[None]).loss) * 10 for row in ids]
    assert losses.tolist() == pytest.approx(own, rel=1e-5)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


def test_a_tied_head_is_trained_as_one_with_the_embeddings(corpora: list[Corpus], tmp_path: Path) -> None:
    folder = save_release(tmp_path, "gemma2", tie_word_embeddings=True)
    plain = PlainRun(folder, corpora, settings())

    made = aligned(folder, tmp_path / "out", corpora)

    assert losses_of(tmp_path / "out") == pytest.approx(plain.losses, rel=1e-5)
    assert "lm_head.weight" not in weights_of(made.folder)


def test_the_divergence_counts_all_other_tokens_as_one() -> None:
    rng = np.random.default_rng(0)
    head = torch.tensor(rng.standard_normal((9, 5)), dtype=torch.float32)
    hidden = torch.tensor(rng.standard_normal((2, 4, 5)), dtype=torch.float32, requires_grad=True)
    teacher = rng.standard_normal((2, 4, 9))
    log_p = teacher - np.log(np.exp(teacher).sum(-1, keepdims=True))
    top = np.argsort(-log_p, axis=-1)[..., :3]
    given = torch.tensor(top), torch.tensor(np.take_along_axis(log_p, top, -1), dtype=torch.float32)

    _, found = token_losses(
        lambda each: each @ head.T, hidden, torch.ones(2, 4, dtype=torch.int64), chunk=4, teacher=given
    )

    logits = hidden.detach().numpy().astype(np.float64) @ head.numpy().astype(np.float64).T
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.zeros(2)
    for sequence in range(2):
        for position in range(3):  # the last one predicts nothing
            p_top = np.exp(log_p[sequence, position, top[sequence, position]])
            q_top = q[sequence, position, top[sequence, position]]
            p = np.append(p_top, 1 - p_top.sum())
            other = np.append(q_top, 1 - q_top.sum())
            expected[sequence] += (p * np.log(p / other)).sum()
    assert found is not None
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    found.sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_distillation_is_what_a_plain_loop_with_both_models_computes(
    release: Path, corpora: list[Corpus], tmp_path: Path
) -> None:
    weight = 0.7
    asked = settings(distillation=weight, steps=6)
    base = release.with_name("base")
    teaching = TeachingSettings(
        k=5, sequences=48, sequence_length=TOKENS, held_out=asked.held_out, shuffle_window=asked.shuffle_window
    )
    teach(base, tmp_path / "teacher", corpora=corpora, settings=teaching)

    align(release, tmp_path / "out", corpora=corpora, settings=asked, teacher=tmp_path / "teacher")

    student = AutoLoramModel.from_pretrained(release, dtype=torch.float32)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stream = training_stream(release, corpora, asked)
    optimizer = torch.optim.AdamW(student.parameters(), lr=asked.learning_rate, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, asked.warmup_steps, asked.steps)
    records = [record for record in log_of(tmp_path / "out") if record["step"]]
    assert len(records) == 6
    for record in records:
        ids = torch.tensor(np.stack([next(stream).ids for _ in range(asked.batch_size)]), dtype=torch.int64)
        with torch.no_grad():
            p, top = teacher(input_ids=ids).logits[:, :-1].softmax(-1).topk(5)
        answer = student(input_ids=ids, labels=ids)
        q = answer.logits[:, :-1].softmax(-1).gather(-1, top)
        p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], dim=-1)
        q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], dim=-1)
        divergence = (p * (p / q).log()).sum(-1).mean()
        objective = (1 - weight) * answer.loss + weight * divergence
        assert record["loss"] == pytest.approx(answer.loss.item(), rel=1e-3)  # the targets are stored in fp16
        assert record["divergence"] == pytest.approx(divergence.item(), rel=2e-3)
        assert record["objective"] == pytest.approx(objective.item(), rel=2e-3)
        objective.backward()
        nn.utils.clip_grad_norm_(student.parameters(), asked.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def test_a_teacher_of_another_model_is_refused(release: Path, corpora: list[Corpus], tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", tiny_config("llama", layers=2))
    save_tokenizer(other)
    asked = settings(distillation=0.5, steps=2, warmup_steps=0)
    teaching = TeachingSettings(
        k=5, sequences=16, sequence_length=TOKENS, held_out=asked.held_out, shuffle_window=asked.shuffle_window
    )
    teach(other, tmp_path / "wrong", corpora=corpora, settings=teaching)
    copied = shutil.copytree(release.with_name("base"), tmp_path / "copied")
    teach(copied, tmp_path / "right", corpora=corpora, settings=teaching)

    for function in (align, check_align):
        with pytest.raises(IncompatibleError, match=r"targets of other \(.*the release was pruned from base \("):
            function(release, tmp_path / "out", corpora=corpora, settings=asked, teacher=tmp_path / "wrong")
    made = align(release, tmp_path / "out", corpora=corpora, settings=asked, teacher=tmp_path / "right")

    assert made.manifest.alignment is not None
    digest = TeacherShards.open(tmp_path / "right").digest
    assert made.manifest.alignment["teacher"] == {"id": "copied", "commit": None, "k": 5, "digest": digest}


COMMITS = ["a" * 40, "b" * 40]


@pytest.mark.parametrize(
    ("taught", "asked", "read"),
    [
        ((None, "main"), (None, "main"), COMMITS),
        (("main", "main"), (None, "v2"), [COMMITS[0], "v2"]),
        ((None, "main"), (None, "c" * 40), [COMMITS[0], "c" * 40]),
    ],
)
def test_datasets_are_read_at_the_commits_that_the_teacher_has_read(
    release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    taught: tuple[str | None, ...],
    asked: tuple[str | None, ...],
    read: list[str],
) -> None:
    class Opened(Exception):
        """The stream would be opened."""

    def opened(corpora: tuple[Corpus, ...], *_: Any, **__: Any) -> None:
        raise Opened(*(corpus.revision for corpus in corpora))

    def datasets(revisions: Iterable[str | None]) -> tuple[Corpus, ...]:
        return tuple(Corpus(source=f"org/{number}", revision=each) for number, each in enumerate(revisions))

    record = TeacherRecord(
        base={"id": "base", "commit": None, "config_sha256": ""},
        settings=TeachingSettings(),
        compute_type="float32",
        vocab_size=53,
        requested=datasets(taught),
        corpora=datasets(COMMITS),
        stream_digest="",
    )
    write_finished(tmp_path, record, rank=0)
    monkeypatch.setattr(requests, "PackedStream", opened)

    with pytest.raises(Opened) as found:
        align(
            release,
            tmp_path.with_name("out"),
            corpora=datasets(asked),
            settings=settings(distillation=1.0),
            teacher=tmp_path,
        )

    assert list(found.value.args) == read


def test_targets_of_another_stream_are_refused(release: Path, corpora: list[Corpus], tmp_path: Path) -> None:
    teaching = TeachingSettings(k=5, sequences=96, sequence_length=TOKENS, held_out=3, shuffle_window=100, seed=1)
    teach(release.with_name("base"), tmp_path / "teacher", corpora=corpora, settings=teaching)

    with pytest.raises(IncompatibleError):
        aligned(release, tmp_path / "out", corpora, distillation=0.5, teacher=tmp_path / "teacher")

    assert not (tmp_path / "out-run" / "run.json").exists()


def test_a_student_that_agrees_with_its_teacher_has_no_divergence() -> None:
    logits = torch.randn(1, 6, 20, generator=torch.Generator().manual_seed(0)) * 5
    log_p = logits.log_softmax(-1)
    given = log_p.topk(8)

    _, found = token_losses(
        lambda each: each,
        logits,
        torch.zeros(1, 6, dtype=torch.int64),
        chunk=100,
        teacher=(given.indices, given.values),
    )

    assert found is not None
    assert float(found) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("trainable", "frozen"),
    [
        ("full", set()),
        ("no-embeddings", {"model.embed_tokens.weight"}),
        ("norms+projections", {"model.embed_tokens.weight", "lm_head.weight"}),
    ],
)
def test_what_is_not_trained_stays_bit_for_bit(
    corpora: list[Corpus], tmp_path: Path, trainable: str, frozen: set[str]
) -> None:
    folder = save_release(tmp_path, dtype="float16")  # which bf16 cannot hold

    made = aligned(folder, tmp_path / "out", corpora, trainable=trainable, steps=4, warmup_steps=0, precision="bf16")

    before, after = weights_of(folder), weights_of(made.folder)
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}


def test_the_aligned_release_is_one_like_any_other(release: Path, corpora: list[Corpus], tmp_path: Path) -> None:
    made = aligned(release, tmp_path / "out", corpora)

    verify(made.folder)
    model = AutoLoramModel.from_pretrained(made.folder)
    assert set(weights_of(made.folder)) == set(weights_of(release))
    assert not torch.equal(
        model.get_input_embeddings().weight, AutoLoramModel.from_pretrained(release).get_input_embeddings().weight
    )
    assert (made.folder / "tokenizer.json").read_bytes() == (release / "tokenizer.json").read_bytes()
    nf4 = quantize(made.folder, tmp_path / "nf4")
    assert nf4.manifest.alignment == made.manifest.alignment
    facts, recipe = made.manifest.alignment, made.manifest.recipe["align"]
    assert facts is not None
    assert facts["tokens"] == 12 * 8 * TOKENS
    assert facts["corpora"] == ["steps.jsonl", "strides.jsonl"]
    assert [step for step, _ in facts["losses"]] == list(range(1, 13))
    assert [step for step, _ in facts["held_out"]] == [0, 5, 10, 12]
    assert {key: value for key, value in recipe.items() if key != "corpora"} == asdict(settings())
    assert [corpus["source"] for corpus in recipe["corpora"]] == ["steps.jsonl", "strides.jsonl"]
    assert str(tmp_path.parent) not in (made.folder / "loram.json").read_text()


def test_a_run_that_is_done_is_not_run_again(release: Path, corpora: list[Corpus], tmp_path: Path) -> None:
    aligned(release, tmp_path / "out", corpora)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    said = log_of(tmp_path / "out")

    aligned(release, tmp_path / "out", corpora)

    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert log_of(tmp_path / "out") == said
    assert not (tmp_path / "out-run" / "checkpoints").exists()
    with pytest.raises(InvalidRequestError, match="already exists"):
        aligned(release, tmp_path / "out", corpora, resume="never")
    with pytest.raises(InvalidRequestError, match=r"another run: seed was 0 and is 1"):
        aligned(release, tmp_path / "out", corpora, seed=1, overwrite=True)
    made = aligned(release, tmp_path / "out", corpora, seed=1, overwrite=True, resume="never")
    assert made.manifest.recipe["align"]["seed"] == 1


class TooMuch(Exception):
    """What stands for the end of the machine."""


def stopping_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """End the process, so to speak, after so many optimizer steps."""
    done, step = [0], ShardedAdamW.step

    def counted(self: ShardedAdamW, learning_rate: float) -> None:
        if done[0] == steps:
            raise TooMuch
        done[0] += 1
        step(self, learning_rate)

    monkeypatch.setattr(ShardedAdamW, "step", counted)


def test_a_run_goes_on_from_its_last_checkpoint(
    release: Path, corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = aligned(release, tmp_path / "whole", corpora)
    with monkeypatch.context() as patched:
        stopping_after(patched, 8)
        with pytest.raises(TooMuch):
            aligned(release, tmp_path / "out", corpora, save_every=3)
    kept = sorted(path.name for path in (tmp_path / "out-run" / "checkpoints").glob("step-*"))

    with monkeypatch.context() as patched:
        stopping_after(patched, 6)  # steps 7 to 12
        made = aligned(release, tmp_path / "out", corpora, micro_batch_size=1, save_every=5)

    assert kept == ["step-00000003", "step-00000006"]
    assert losses_of(tmp_path / "out") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-5)
    for name, values in weights_of(whole.folder).items():
        assert torch.allclose(weights_of(made.folder)[name], values, atol=1e-4), name


def test_a_damaged_log_stops_a_run_that_would_go_on(
    release: Path, corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stopping_after(patched, 8)
        with pytest.raises(TooMuch):
            aligned(release, tmp_path / "out", corpora, save_every=3)
    log = tmp_path / "out-run" / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3] + lines[4:]))

    with pytest.raises(VerificationError, match="does not have every step up to 6"):
        aligned(release, tmp_path / "out", corpora)


def test_a_corpus_that_runs_out_loses_no_finished_step(release: Path, tmp_path: Path) -> None:
    short = Corpus(source=str(save_texts(tmp_path / "short.jsonl", stride=1, documents=40)))
    with pytest.raises(InvalidRequestError, match=r"short\.jsonl"):
        aligned(release, tmp_path / "out", [short], save_every=100)

    done = [record["step"] for record in log_of(tmp_path / "out")][-1]
    assert 0 < done < 12
    assert [path.name for path in (tmp_path / "out-run" / "checkpoints").glob("step-*")] == [f"step-{done:08d}"]


def test_a_loss_that_is_no_number_stops_before_it_does_harm(
    release: Path, corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = TrainedModel.forward, [0]

    def poisoned(self: TrainedModel, ids: torch.Tensor, teacher: Any = None) -> Any:
        losses, divergences = forward(self, ids, teacher)
        calls[0] += torch.is_grad_enabled()
        if calls[0] == 10:  # the second half of step 5: sequences 36 to 39
            losses = losses * torch.tensor([1.0, float("nan"), 1.0, float("inf")])
        return losses, divergences

    whole = aligned(release, tmp_path / "whole", corpora, micro_batch_size=4, run_dir=tmp_path / "elsewhere")
    with monkeypatch.context() as patched:
        patched.setattr(TrainedModel, "forward", poisoned)
        with pytest.raises(TrainingError, match=r"Step 5 of 12: the loss is not finite, in sequence\(s\) 37, 39 of"):
            aligned(release, tmp_path / "out", corpora, save_every=3, micro_batch_size=4)

    assert [path.name for path in (tmp_path / "out-run" / "checkpoints").glob("step-*")] == ["step-00000003"]
    made = aligned(release, tmp_path / "out", corpora, micro_batch_size=4)
    assert (made.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()


def spoiling_at(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> None:
    """Put a value into a weight by the update of a step."""
    done, update = [0], ShardedAdamW.step

    def spoiled(self: ShardedAdamW, learning_rate: float) -> None:
        update(self, learning_rate)
        done[0] += 1
        if done[0] == step:
            local_of(self.parameters["model.layers.1.mlp.down_proj.weight"])[0, 0] = value

    monkeypatch.setattr(ShardedAdamW, "step", torch.no_grad()(spoiled))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (6, "After step 6 of 12 1 of the weights are not finite; .* of step 3 "),
        (
            5,
            r"After step 5 of 12 the loss on the held-out texts of steps\.jsonl, strides\.jsonl is not .* of step 3 ",
        ),
        (12, "After step 12 of 12 .* not finite; .* of step 9 "),
    ],
)
def test_weights_that_are_not_finite_are_never_saved(
    release: Path, corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, said: str
) -> None:
    with monkeypatch.context() as patched:
        spoiling_at(patched, step, float("nan"))
        with pytest.raises(TrainingError, match=said):
            aligned(release, tmp_path / "out", corpora, save_every=3)

    kept = sorted(path.name for path in (tmp_path / "out-run" / "checkpoints").glob("step-*"))
    assert kept[-1] == f"step-{(step - 1) // 3 * 3:08d}"
    assert not (tmp_path / "out").exists()
    made = aligned(release, tmp_path / "out", corpora, save_every=3)
    assert losses_of(tmp_path / "out")[-1] < losses_of(tmp_path / "out")[0]
    assert all(bool(values.isfinite().all()) for values in weights_of(made.folder).values())


def test_weights_beyond_the_type_of_the_release_are_not_released(
    corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_release(tmp_path, dtype="float16")
    spoiling_at(monkeypatch, 4, 1e6)

    with pytest.raises(TrainingError, match=r"layers\.1\.mlp\.down_proj\.weight is not finite in float16"):
        aligned(folder, tmp_path / "out", corpora, steps=4)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_told_with_what_to_lower(
    release: Path, corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(TrainedModel, "_logits", full)
    with pytest.raises(ResourceError, match=r"micro_batch_size.*activation_checkpointing"):
        aligned(release, tmp_path / "out", corpora, held_out=0)


def test_a_real_allocation_that_fails_is_told(
    release: Path, corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainedModel, "_logits", lambda *_: torch.empty(2**55))

    with pytest.raises(ResourceError, match="Memory ran out on the CPU"):
        aligned(release, tmp_path / "out", corpora, held_out=0)


def test_two_runs_never_share_a_folder(release: Path, corpora: list[Corpus], tmp_path: Path) -> None:
    with RunFolder(tmp_path / "out-run").locked(), pytest.raises(ResourceError, match="Another run is at work"):
        aligned(release, tmp_path / "out", corpora)


def test_a_process_that_waited_for_a_lock_does_not_hold_it_beside_another(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked():
        waiting = (tmp_path / ".lock").open("a")
    with waiting:
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)

        with pytest.raises(ResourceError, match="Another run is at work"), folder.locked():
            pass


def test_the_curves_of_a_run_are_drawn_when_it_ends(
    release: Path, corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned(release, tmp_path / "out", corpora, steps=4)

    drawn = tmp_path / "out-run" / "curves.png"
    assert drawn.read_bytes() == draw_curves(log_of(tmp_path / "out"))
    drawn.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    RunFolder(tmp_path / "out-run").draw()
    assert not drawn.exists()


def test_corpora_of_one_name_are_told_apart_and_their_sources_kept(release: Path, tmp_path: Path) -> None:
    corpora = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        corpora.append(Corpus(source=str(save_texts(tmp_path / str(number) / "texts.jsonl", stride=1, seed=number))))

    made = aligned(release, tmp_path / "out", corpora, steps=4)

    assert made.manifest.alignment is not None
    assert made.manifest.alignment["corpora"] == ["texts.jsonl (1)", "texts.jsonl (2)"]
    assert [corpus["source"] for corpus in made.manifest.recipe["align"]["corpora"]] == ["texts.jsonl"] * 2


def test_a_file_without_texts_is_not_told_to_be_short_of_them(release: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"content": "w4 w5"}\n')

    for held_out in (0, 3):
        with pytest.raises(InvalidRequestError, match="has no column 'text'; its columns are: content"):
            aligned(release, tmp_path / "out", [Corpus(source=str(tmp_path / "texts.jsonl"))], held_out=held_out)


def test_the_estimate_says_what_is_trained(release: Path, corpora: list[Corpus], tmp_path: Path) -> None:
    asked = settings(processes=2, trainable="norms+projections")

    found = check_align(release, tmp_path / "out", corpora=corpora, settings=asked)

    shapes = {name: tensor.shape for name, tensor in weights_of(release).items()}
    trained = {name: shape for name, shape in shapes.items() if "embed" not in name and "lm_head" not in name}
    rows = {name: (shape[0] + 1) // 2 * int(np.prod(shape[1:])) for name, shape in shapes.items()}
    assert found.parameters == sum(int(np.prod(shape)) for shape in shapes.values())
    assert found.trained_parameters == sum(int(np.prod(shape)) for shape in trained.values())
    assert found.weight_bytes == 4 * sum(rows.values())
    assert found.gradient_bytes == 4 * sum(rows[name] for name in trained)
    assert found.optimizer_bytes == 2 * found.gradient_bytes
    assert found.tokens == 12 * 8 * TOKENS
    assert json.loads(dump_json(found.to_dict()))["process_bytes"] == found.process_bytes
    assert not list(tmp_path.iterdir())


def test_a_70b_release_takes_35_7_gb_on_each_of_eight_gpus() -> None:
    config = {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    architecture = architecture_of(config)
    sizes = planned_sizes(architecture, PruningSettings(pruning_ratio=0.85))
    kept: dict[int, dict[Space, Indices]] = {
        layer: {
            "kv_heads": np.arange(each.kv_heads, dtype=np.int32),
            "channels": np.arange(each.channels, dtype=np.int32),
        }
        for layer, each in enumerate(sizes)
    }

    found = estimate(Plan(architecture, kept), AlignmentSettings(), precision="mixed", processes=8)

    assert found.parameters == 17_849_982_976
    held = found.weight_bytes + found.gradient_bytes + found.optimizer_bytes
    assert held / 1e9 == pytest.approx(35.7, abs=0.01)
    eight_bit = replace(AlignmentSettings(), optimizer="adamw_8bit")
    found = estimate(Plan(architecture, kept), eight_bit, precision="mixed", processes=8)
    assert found.optimizer_bytes == pytest.approx((2 + 8 / 256) * 17_849_982_976 / 8, rel=1e-3)


def test_a_process_without_rows_of_a_tensor_saves_and_loads_as_the_others_do() -> None:
    with joined_ranks(processes=1, device="cpu") as ranks:

        def optimizer() -> ShardedAdamW:
            named = {"some": torch.ones(3, 4), "none": torch.ones(0, 4)}
            return ShardedAdamW(
                ((name, nn.Parameter(distribute_tensor(values, ranks.mesh))) for name, values in named.items()),
                settings(),
            )

        first, second = optimizer(), optimizer()
        for each in first.parameters.values():
            each.grad = torch.ones_like(each)
        first.step(1e-2)
        saved = {name: value.full_tensor() for name, value in first.state(ranks).items()}
        for name, value in second.state(ranks).items():
            local_of(value).copy_(saved[name])
        second.set_steps(1)

        assert {name: value.shape[0] for name, value in saved.items()} == {
            f"{name}{kind}": rows
            for name, rows in (("some", 3), ("none", 0))
            for kind in ("", "/exp_avg", "/exp_avg_sq")
        }
        for each in (first, second):
            each.parameters["some"].grad = torch.ones_like(each.parameters["some"])
            each.step(1e-2)
        assert torch.equal(local_of(first.parameters["some"]), local_of(second.parameters["some"]))
        assert first.weights_not_finite(ranks) == 0


def test_the_state_of_8_bit_adamw_stays_with_its_number_of_processes(release: Path) -> None:
    asked = settings(optimizer="adamw_8bit")
    with joined_ranks(processes=1, device="cpu") as ranks:
        model = sharded_model(open_release(release), asked, ranks, precision="fp32")
        optimizer = ShardedAdamW(model.named_parameters(), asked)

        state = optimizer.state(ranks)

        assert {name for name in state if "/" not in name} == set(weights_of(release))
        assert {name.split("/")[1] for name in state if "/" in name} == {"0-of-1"}
        optimizer.check_loadable(1, ranks)
        with pytest.raises(IncompatibleError, match="saved by 8 processes with 8-bit AdamW"):
            optimizer.check_loadable(8, ranks)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"steps": True}, "steps is True"),
        ({"warmup_steps": 12}, r"warmup_steps is 12 of 12 steps.* Set warmup_steps \(--warmup-steps\) below"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": "5e-5"}, "learning_rate is '5e-5'"),
        ({"distillation": 1.5}, "distillation is 1.5"),
        ({"beta2": 1.0}, "must lie below 1"),
        ({"max_grad_norm": float("inf")}, "must be finite"),
        ({"precision": "fp16"}, "precision is 'fp16'; choose auto or fp32 or mixed or bf16"),
        ({"trainable": "all"}, "trainable is 'all'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"compile": 1}, "compile is 1"),
        ({"processes": 0}, "processes is 0"),
        ({"sequence_length": 1}, "sequence_length is 1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        settings(**changes)


def test_the_defaults_are_the_paper_s() -> None:
    asked = AlignmentSettings()

    assert (asked.sequence_length, asked.batch_size, asked.steps) == (512, 128, 1600)
    assert (asked.learning_rate, asked.warmup_steps) == (5e-5, 100)
    assert asked.tokens == 104_857_600
    assert asked.chunk_for(128_256) * 128_256 * 4 <= 2**29


def test_the_learning_rate_can_end_above_zero() -> None:
    asked = settings(min_lr_ratio=0.1)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=asked.learning_rate)
    schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, asked.warmup_steps, asked.steps, min_lr_rate=asked.min_lr_ratio
    )
    for step in range(asked.steps):
        assert learning_rate_at(step, asked) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()


LAUNCHED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("environment", "processes", "said"),
    [
        ({"WORLD_SIZE": "2"}, None, "RANK is not set"),
        ({"WORLD_SIZE": "abc"}, None, "WORLD_SIZE is 'abc', which is no number"),
        ({"MASTER_ADDR": "localhost"}, None, r"has MASTER_ADDR, .* unset MASTER_ADDR, or say processes=1"),
        ({**LAUNCHED, "MASTER_PORT": "notaport"}, None, "MASTER_PORT must be whole numbers.*notaport"),
        ({**LAUNCHED, "MASTER_PORT": "70000"}, None, "MASTER_PORT is 70000"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, None, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0"}, None, "half a launcher's environment"),
        ({"SLURM_NTASKS": "8"}, None, "each of the 8 tasks of srun would train alone"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, None, "each of the 4 tasks of mpirun would train alone"),
        ({}, 2, "meant for 2 processes and was started with 1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, None, "ACCELERATE_USE_DEEPSPEED is set"),
        ({"ACCELERATE_USE_FSDP": "true"}, None, "accelerate was asked for FSDP and started one process"),
    ],
    ids=str,
)
def test_a_launch_that_would_become_something_else_is_refused(
    environment: Mapping[str, str], processes: int | None, said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        read_launch(environment, processes=processes)


def test_launchers_are_understood() -> None:
    found = Launch(rank=3, size=4, local_rank=1, local_size=2)

    assert read_launch(LAUNCHED) == found
    assert read_launch({**LAUNCHED, "SLURM_NTASKS": "2", "ACCELERATE_USE_FSDP": "true"}, processes=4) == found
    assert read_launch({"SLURM_NTASKS": "1", "WORLD_SIZE": "1"}).is_alone
    assert read_launch({"ACCELERATE_USE_FSDP": "true"}, processes=1).is_alone
    assert read_launch({"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, processes=1).is_alone
    assert read_launch({"WORLD_SIZE": "", "MASTER_ADDR": ""}).is_alone
    with pytest.raises(InvalidRequestError, match="meant for 8 processes and was started with 4"):
        read_launch(LAUNCHED, processes=8)
    with pytest.raises(InvalidRequestError, match="RANK is 4 of WORLD_SIZE 4"):
        read_launch({**LAUNCHED, "RANK": "4"})
    with pytest.raises(InvalidRequestError, match="must be whole numbers"):
        read_launch({**LAUNCHED, "RANK": "first"})


def test_several_processes_that_accelerate_would_not_start_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(script)]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}

    said = subprocess.run(launcher, env=environment, capture_output=True, text=True, check=True).stdout

    found = json.loads(said)  # one process alone has printed it
    with pytest.raises(InvalidRequestError, match=r"has MASTER_ADDR and MASTER_PORT, .* torchrun"):
        read_launch(found)


def test_a_precision_that_accelerate_asks_for_is_not_passed_over() -> None:
    check_precision({"ACCELERATE_MIXED_PRECISION": "no"}, "fp32")
    check_precision({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed")
    with pytest.raises(InvalidRequestError, match="'bf16'; this run computes in fp32"):
        check_precision({"ACCELERATE_MIXED_PRECISION": "bf16"}, "fp32")
    with pytest.raises(InvalidRequestError, match="'fp16'"):
        check_precision({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"processes": 2}, "meant for 2 processes"),
        ({"sequence_length": 65}, "positions for 64 tokens"),
        ({"device": "mps"}, "device is 'mps'"),
        ({"device": "cuda"}, "torch sees 0 GPUs"),
        ({"optimizer": "adamw_8bit"}, "runs on CUDA"),
        ({"distillation": 0.5}, "the one needs the other"),
        ({"teacher": "shards"}, "the one needs the other"),
        ({"resume": "always"}, "resume is 'always'"),
        ({"report_to": ("wandbb",)}, "wandbb"),
        ({"steps": 4000, "save_every": 1000}, "tokens at the most"),
        ({"run_dir": "out/inside"}, "overlap"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [align, check_align], ids=["align", "check_align"])
def test_what_cannot_work_is_refused_before_training(
    release: Path,
    corpora: list[Corpus],
    tmp_path: Path,
    function: Callable[..., Any],
    changes: dict[str, Any],
    said: str,
) -> None:
    if torch.cuda.is_available() and {"device", "optimizer"} & set(changes):
        pytest.skip("a GPU is there")
    if function is check_align and {"processes", "device"} & set(changes):
        pytest.skip("check_align checks for other machines than this one")
    os.chdir(tmp_path)
    asked = settings(**{key: value for key, value in changes.items() if key in AlignmentSettings.__dataclass_fields__})
    others = {key: value for key, value in changes.items() if key not in AlignmentSettings.__dataclass_fields__}

    with pytest.raises(LoramError, match=said):
        function(release, "out", corpora=corpora, settings=asked, **others)

    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out-run" / "log.jsonl").exists()


def test_nf4_weights_are_not_trained(release: Path, corpora: list[Corpus], tmp_path: Path) -> None:
    nf4 = quantize(release, tmp_path / "nf4")

    with pytest.raises(InvalidRequestError, match="Align the unquantized release, then quantize"):
        aligned(nf4.folder, tmp_path / "out", corpora)


def test_a_release_without_tokenizer_is_refused(corpora: list[Corpus], tmp_path: Path) -> None:
    folder = save_release(tmp_path, has_tokenizer=False)

    with pytest.raises(InvalidRequestError, match="tokenizer"):
        aligned(folder, tmp_path / "out", corpora)


def test_what_is_read_is_not_written_over(release: Path, corpora: list[Corpus], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="overlap"):
        aligned(release, release, corpora, overwrite=True)
    folder = Path(corpora[0].source).parent
    for out in (folder, folder / "inside"):
        with pytest.raises(InvalidRequestError, match="overlap"):
            aligned(release, out, [Corpus(source=str(folder))], overwrite=True)
    with pytest.raises(InvalidRequestError, match="overlap"):
        aligned(release, tmp_path / "o", [Corpus(source=str(folder))], run_dir=folder / "run")
    (tmp_path / "teacher").mkdir()
    with pytest.raises(InvalidRequestError, match="overlap"):
        aligned(release, tmp_path / "teacher", corpora, distillation=0.5, teacher=tmp_path / "teacher", overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"steps.jsonl", "strides.jsonl"}


def test_the_model_on_meta_takes_no_memory(release: Path) -> None:
    model = model_on_meta(open_release(release))

    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        name: tuple(tensor.shape) for name, tensor in weights_of(release).items()
    }


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the child runs one function and ends
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent ended")
@pytest.mark.parametrize(("is_there", "status"), [(True, 0), (False, -signal.SIGKILL)])
def test_a_process_whose_launcher_ended_while_it_was_imported_does_not_stay_behind(
    is_there: bool, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv(LAUNCHED_BY, f"{socket.gethostname()}:{os.getpid() if is_there else gone.pid}")

    child = os.fork()
    if child == 0:
        end_with_launcher()
        os._exit(0)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
