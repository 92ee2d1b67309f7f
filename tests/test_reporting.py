"""A report says what its sources hold, in numbers that can be checked, and in one file that needs nothing else."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from builders import save_adapter, save_base, save_metadata_release, save_tokenizer, tiny_architecture, tiny_config
from click.testing import CliRunner
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from pipeline_materials import save_texts, tiny_recipe
from report_materials import LAYERS, Sources, run_record, save_sources, scores_of
from safetensors.numpy import load_file

from loram_hub.cards.numbers import finite
from loram_hub.cards.pictures import alignment_curve, curve_styles, held_out_curves
from loram_hub.cli import main
from loram_hub.errors import (
    AccessError,
    CheckpointError,
    InvalidRequestError,
    PlanMismatchError,
    VerificationError,
)
from loram_hub.files import dump_json, read_json, sha256_of
from loram_hub.importance.stored import StoredScores, write_scores
from loram_hub.plan import Plan
from loram_hub.release import open_metadata
from loram_hub.reporting import drawings, report
from loram_hub.reporting.contents import Contents, Part, Section, Table
from loram_hub.reporting.gathering import gather
from loram_hub.reporting.page import render_page
from loram_hub.reporting.release_sections import importance_section, memory_section
from loram_hub.reporting.releases import importance_facts
from loram_hub.reporting.reporting import contents_of
from loram_hub.reporting.trainings import run_facts
from loram_hub.reporting.tuning_sections import norms_section, recovery_section
from loram_hub.reporting.wording import without_folders

SECTIONS = (
    "Before and after recovery",
    "Kept heads and channels",
    "Importance scores",
    "Alignment",
    "Memory of fine-tuning",
    "Losses of fine-tuning",
    "Where the updates went",
    "Study study",
    "Names, digests, versions, seeds",
)


@dataclass
class Seen(HTMLParser):
    """What a page holds, as a parser of its own reads it."""

    addresses: list[str] = field(default_factory=list)
    alts: list[str] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._cell: str | None = None
        self._table: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [values[name] or "" for name in ("src", "href", "action", "data") if name in values]
        assert not [name for name in values if name.startswith("on")]
        assert tag not in ("script", "iframe", "object", "embed")
        if tag == "img":
            self.alts.append(values.get("alt") or "")
        elif tag == "table":
            self._table = self.tables.setdefault(values["aria-label"] or "", [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self._table[-1].append(self._cell)
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self._cell += data


def seen(page: Path) -> Seen:
    parser = Seen()
    parser.feed(page.read_text())
    assert parser.text.strip()
    return parser


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return save_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def scores(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    release = open_metadata(sources.release)
    path = tmp_path_factory.mktemp("scores") / "importance.safetensors"
    write_scores(path, stored(scores_of(release.plan), release.manifest.base.config_sha256))
    return path


def stored(scores: Any, config_sha256: str) -> StoredScores:
    return StoredScores(
        scores=scores, importance="taylor:param_first", seed=3, base_id="org/base", base_commit=None,
        base_config_sha256=config_sha256, calibration=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(sources: Sources, scores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section."""
    out = tmp_path_factory.mktemp("whole") / "report.html"
    written = report(sources.all, out, compare=sources.plain, importance=scores)
    assert (written.sections, written.missing) == (SECTIONS, ())
    assert written.nbytes == out.stat().st_size
    return out


def test_one_file_holds_everything_and_asks_nobody_for_anything(whole: Path) -> None:
    found = seen(whole)
    inside = [address for address in found.addresses if not address.startswith("#")]

    assert inside.pop(0) == "data:,"  # no icon is asked for
    assert len(inside) >= 9
    assert all(address.startswith("data:image/png;base64,") for address in inside)
    pictures = {base64.b64decode(address.partition(",")[2]) for address in inside}
    assert pictures == {path.read_bytes() for path in (whole.parent / "report_files").iterdir()}
    assert whole.stat().st_size < 5_000_000
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in whole.read_text()


def test_equal_input_gives_equal_bytes(sources: Sources, scores: Path, whole: Path, tmp_path: Path) -> None:
    again = report(sources.all, tmp_path / "other.html", compare=sources.plain, importance=scores)

    assert again.path.read_bytes() == whole.read_bytes()
    for path in again.pictures:
        assert path.read_bytes() == (whole.parent / "report_files" / path.name).read_bytes()


def test_alternative_texts_state_what_is_found_in_numbers(whole: Path) -> None:
    alts = seen(whole).alts

    assert len(alts) == len(set(alts)) >= 9
    assert all(len(re.findall(r"\d", alt)) >= 4 for alt in alts)
    assert any("With the recovered adapter the base's loss is lower than without it (−0.2500)" in alt for alt in alts)


def test_the_losses_of_all_four_models_stand_beside_the_base(whole: Path) -> None:
    rows = seen(whole).tables["Held-out loss in nats per token"]

    assert [row[:3] for row in rows] == [
        ["model", "loss", "to the base"],
        ["base", "3.0000", "–"],
        ["pruned", "3.5000", "+0.5000"],
        ["pruned + adapter", "2.8750", "−0.1250"],
        ["base + recovered adapter", "2.7500", "−0.2500"],
    ]


def test_scores_on_tasks_stand_beside_the_losses(sources: Sources, tmp_path: Path) -> None:
    scores = [
        {"model": model, "task": "arc<b>", "metric": "acc", "filter": "none", "value": value, "stderr": 0.03125}
        for model, value in (("base", 0.25), ("base + recovered adapter", 0.5))
    ]
    described = {"task": "arc<b>", "num_fewshot": 1, "samples": 40, "documents": 200}
    tasks = {"scores": scores, "tasks": [described], "models": [], "provenance": {"versions": {"lm-eval": "0.4.13"}}}
    (tmp_path / "tasks.json").write_text(dump_json({"tasks": tasks}))
    (tmp_path / "both.json").write_text(dump_json(read_json(sources.evaluation) | {"tasks": tasks}))

    found = seen(report([tmp_path / "tasks.json", tmp_path / "both.json"], tmp_path / "report.html").path)

    assert found.text.count("lm-evaluation-harness 0.4.13") == 2
    assert found.tables["Scores on tasks, value ± standard error"][:2] == [
        ["task", "metric", "shots", "base", "base + recovered adapter"],
        ["arc<b>, 40 of 200 questions", "acc", "1", "0.2500 ± 0.0312", "0.5000 ± 0.0312"],
    ]
    assert len(found.alts) == 1  # of the losses, which only one of them has


def test_an_evaluation_of_another_release_is_called_one(sources: Sources, tmp_path: Path) -> None:
    values = read_json(sources.evaluation)
    values["rows"][1]["parameters"] += 1
    (tmp_path / "other.json").write_text(dump_json(values))
    warning = "This is an evaluation of another release"

    own, other = (
        recovery_section(gather([sources.release, path])).parts[0].paragraphs
        for path in (sources.evaluation, tmp_path / "other.json")
    )

    assert not [text for text in own if warning in text]
    assert [text for text in other if warning in text]


def test_kept_groups_are_those_of_the_plan(sources: Sources, whole: Path) -> None:
    plan = open_metadata(sources.release).plan
    rows = seen(whole).tables["Kept heads and channels per layer"][1:]

    assert len(rows) == LAYERS
    for layer, row in enumerate(rows):
        spaces = plan.kept.get(layer)
        assert (int(row[1]), int(row[3])) == (
            (3, 37) if spaces is None else (len(spaces["kv_heads"]), len(spaces["channels"]))
        )


def test_scores_of_kept_and_pruned_groups_are_told_apart(sources: Sources, whole: Path) -> None:
    plan = open_metadata(sources.release).plan
    values = scores_of(plan)
    rows = {row[0]: row[1:] for row in seen(whole).tables["Percentiles of the scores per layer"][1:]}

    assert set(rows["0"]) == {"–"}  # a whole layer was not scored
    for layer, spaces in plan.kept.items():
        kept = values[layer]["channels"][spaces["channels"]]
        pruned = np.delete(values[layer]["channels"], spaces["channels"])
        expected = [*np.percentile(kept, (5, 50, 95)), *np.percentile(pruned, (5, 50, 95))]
        assert [float(cell) for cell in rows[str(layer)][6:]] == pytest.approx(expected, abs=6e-4)


def test_scores_of_another_pruning_are_refused(sources: Sources, tmp_path: Path) -> None:
    release = open_metadata(sources.release)
    others = {
        layer: {space: -values for space, values in spaces.items()} for layer, spaces in scores_of(release.plan).items()
    }
    write_scores(tmp_path / "others.safetensors", stored(others, release.manifest.base.config_sha256))

    with pytest.raises(PlanMismatchError, match="was not pruned by the scores in others"):
        report([sources.release], tmp_path / "report.html", importance=tmp_path / "others.safetensors")

    assert not (tmp_path / "report.html").exists()


def test_scores_of_another_model_are_shown_without_a_plan(sources: Sources, tmp_path: Path) -> None:
    plan = open_metadata(sources.release).plan
    write_scores(tmp_path / "importance.safetensors", stored(scores_of(plan), "9" * 64))

    facts = gather([sources.release], importance=tmp_path / "importance.safetensors")

    figure = importance_section(facts).parts[0].figures[0]
    assert "no release at hand says what was kept" in figure.caption
    assert "pruned" not in figure.alt


def test_alignment_is_shown_against_the_unaligned_model_and_the_base(whole: Path) -> None:
    found = seen(whole)
    alt = next(alt for alt in found.alts if alt.startswith("Alignment"))
    rows = found.tables["Losses of the alignment, nats per token"]

    assert "over 640 tokens" in alt
    assert "unaligned, on texts.jsonl 4.2500 and base, on the data of the evaluation 3.0000" in alt
    assert rows[0] == ["step", "training", "texts.jsonl"]
    assert rows[1] == ["0", "–", "4.2500"]
    assert rows[-1] == ["40", "3.0000", "3.4500"]


def test_long_curves_are_thinned_and_lose_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    history = [{"step": step, "loss": 3.0} for step in range(1, 5001)]
    history += [{"step": step, "eval_held_out_loss": step / 1000} for step in range(7, 5000, 500)]
    (tmp_path / "run" / "finetune.json").write_text(dump_json(run_record("org/r", "d") | {"history": history}))

    page = report([tmp_path / "run"], tmp_path / "report.html").path

    [caption] = [caption for caption in seen(page).tables if caption.startswith("Losses of the fine-tuning")]
    rows = seen(page).tables[caption][1:]
    assert caption.endswith("70 of 5,000 steps")
    assert [float(row[2]) for row in rows if row[2] != "–"] == pytest.approx([n / 1000 for n in range(7, 5000, 500)])
    assert (rows[0][0], rows[-1][0]) == ("1", "5000")


def test_norms_are_those_of_the_whole_product(sources: Sources, whole: Path) -> None:
    plain = load_file(sources.plain / "adapter_model.safetensors")
    rows = {row[0]: row[1:] for row in seen(whole).tables["Norms per layer, over the heads that have an update"]}
    column = rows["layer"].index("plain LoRA: plain: q, mean")
    for layer in range(LAYERS):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        update = 2 * plain[f"{prefix}.lora_B.weight"].astype(float) @ plain[f"{prefix}.lora_A.weight"].astype(float)
        norms = np.linalg.norm(update.reshape(6, -1), axis=1)
        assert float(rows[str(layer)][column]) == pytest.approx(norms.mean(), rel=1e-4)


def test_an_adapter_has_the_same_norms_before_and_after_recovery(sources: Sources) -> None:
    before, after = gather([sources.release, sources.trained, sources.recovered]).adapters

    assert (before.kind, after.kind) == ("pruned adapter", "recovered adapter")
    assert before.norms is not None
    assert after.norms is not None
    for part in ("q", "k", "v", "o"):
        np.testing.assert_allclose(before.norms.heads[part], after.norms.heads[part])
    assert float(before.norms.heads["q"].max()) > 0


def test_pruned_heads_and_channels_have_no_part_in_the_means(sources: Sources, whole: Path) -> None:
    plan = open_metadata(sources.release).plan
    table = seen(whole).tables["Mean norm per layer, and the channels that it is a mean of"]
    active = [[int(cell) for cell in row[1:] if re.fullmatch(r"\d+", cell)] for row in table[1:]]

    for layer, counts in enumerate(active):
        kept = 37 if layer not in plan.kept else len(plan.kept[layer]["channels"])
        assert sorted(counts) == sorted([kept] * 3 + [37] * 3)


def test_what_is_missing_is_said_with_what_would_give_it(sources: Sources, tmp_path: Path) -> None:
    written = report([sources.plain], tmp_path / "report.html")

    text = seen(written.path).text
    assert "Kept heads and channels" in written.missing
    assert "loram report RELEASE -o report.html" in text
    assert "loram eval DATA --base BASE" in text
    # Nothing tells the sizes of its model here: that is said, too.
    assert "The norms of plain could not be computed" in text
    assert str(sources.plain.parent) not in text


def test_a_release_alone_is_enough(sources: Sources, tmp_path: Path) -> None:
    written = report([sources.release], tmp_path / "report.html", title="Mine & <yours>")

    assert written.sections == (SECTIONS[1], SECTIONS[3], SECTIONS[4], SECTIONS[8])
    assert "<h1>Mine &amp; &lt;yours&gt;</h1>" in written.path.read_text()


def test_a_release_in_the_cache_of_the_hub_is_called_by_its_id(sources: Sources, tmp_path: Path) -> None:
    commit = "4" * 40
    repository = Path(constants.HF_HUB_CACHE) / "models--alice--reported"
    shutil.copytree(sources.release, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)

    [found] = gather(["alice/reported"]).releases

    assert (found.name, found.commit) == ("alice/reported", commit)


@settings(max_examples=25)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1), min_size=4))
def test_any_text_comes_out_as_text(texts: list[str]) -> None:
    table = Table(caption="t", header=("a", "b"), rows=tuple(zip(texts, reversed(texts), strict=True)))
    section = Section(id="s", title=texts[0], parts=(Part(paragraphs=(texts[1],), tables=(table,)),), hint=texts[2])
    found = Seen()

    found.feed(render_page(Contents(title=texts[3], lead=(), key_figures=(), sections=(section,)), {}))

    assert found.tables["t"][1:] == [list(row) for row in table.rows]
    assert all(text in found.text for text in (texts[0], texts[1], texts[3]))


def test_no_path_of_this_machine_is_told(sources: Sources, whole: Path) -> None:
    page = whole.read_text()

    assert "/somewhere/private" not in page
    assert str(sources.release.parent) not in page


def test_several_releases_and_runs_stand_one_after_the_other(sources: Sources, tmp_path: Path) -> None:
    other = save_metadata_release(
        tmp_path / "other", tiny_config(layers=3), Plan(tiny_architecture(layers=3), {}), base_id="org/other"
    )
    written = report([sources.release, other, sources.run], tmp_path / "report.html", dry_run=True)

    assert not written.path.exists()
    assert [path.name for path in written.pictures] == [
        "kept-groups.png", "alignment.png", "memory.png", "memory-2.png", "training.png",
    ]  # fmt: skip


def test_a_run_that_is_going_on_is_read_from_its_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 10):
        (run / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        log = [{"step": n, "loss": float("nan") if n == 1 else 3.0, "grad_norm": float("nan")} for n in range(1, step)]
        (run / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (run / "run.json").write_text(dump_json({"recipe": {"release": "org/release"}}))

    facts = run_facts(run, name="run")

    assert (facts.is_finished, facts.step, facts.release) == (False, 10, "org/release")
    assert [step for step, _ in facts.curves.training] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [step for step, loss in facts.curves.training if np.isnan(loss)] == [1]


@pytest.mark.parametrize(
    "history",
    [
        None,
        "none",
        [None, 3, "x", [1, 2]],
        [{"step": "1", "loss": 2.0}, {"step": 2, "loss": "2.0"}, {"step": -1, "loss": 1.0}],
        [{"step": True, "loss": 2.0}, {"step": 3, "loss": True}, {"step": 10**400, "loss": 1}],
        [{"step": 1, "eval_x_loss": [1]}, {"step": 1, "eval__loss": {"a": 1}}],
        [{"loss": 1.0}, {"step": 1}],
    ],
)
def test_what_is_no_loss_is_left_out(history: object, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finetune.json").write_text(
        dump_json({"history": history, "recipe": [], "versions": 3, "data": {"records": {}}, "steps": "many"})
    )

    facts = run_facts(tmp_path / "run", name="run")

    assert (facts.curves.training, dict(facts.curves.held_out), facts.step) == ((), {}, None)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real publication of a tiny model, with its work folder, and a real run on what came of it."""
    from loram_hub.finetuning import FinetuneRecipe, finetune
    from loram_hub.pipeline import publish, recipe_from
    from loram_hub.recipes import section_from

    folder = tmp_path_factory.mktemp("published")
    base = save_tokenizer(save_base(folder / "base", tiny_config(layers=4)))
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    (base / "LICENSE").write_text("MIT License\n\nPermission is hereby granted, free of charge, ...\n")
    save_texts(folder / "texts.jsonl", count=60)
    recipe = tiny_recipe(folder)
    del recipe["quantize"]
    recipe["prune"] = {"pruning_ratio": 0.4, "keep_first": 1, "keep_last": 1, "importance": "random"}
    recipe["align"]["steps"] = 2
    publish(recipe_from(recipe), work_dir=folder / "work")
    tasks = [{"prompt": f"w{n + 4}", "completion": f" w{n + 5}"} for n in range(16)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    values = {
        "release": str(folder / "work" / "aligned"), "dtype": "float32", "seed": 3,
        "data": {"train": [{"source": str(folder / "tasks.jsonl")}], "held_out": 4},
        "training": {"steps": 2, "batch_size": 4, "micro_batch": 4, "max_tokens": 16}, "checkpoints": {"every": 2},
    }  # fmt: skip
    finetune(section_from(FinetuneRecipe, values), folder / "run")
    return folder


def test_a_publication_and_a_run_tell_their_whole_story(published: Path, tmp_path: Path) -> None:
    written = report([published / "work", published / "run"], tmp_path / "report.html")

    found = seen(written.path)
    assert written.sections == tuple(title for title in SECTIONS if not title.startswith("Study"))
    losses = read_json(published / "work" / "evaluation.json")["rows"]
    table = found.tables["Held-out loss in nats per token"]
    assert [row[1] for row in table[1:3]] == [f"{row['loss']:.4f}" for row in losses]
    assert [row[1] for row in table[3:]] == ["not measured", "not measured"]
    stages = found.tables["What the stages of the publication took"]
    assert [row[0] for row in stages[1:]] == ["prune", "align", "evaluate", "card"]
    record = read_json(published / "run" / "finetune.json")
    assert f"{record['history'][0]['loss']:.4f}" in found.text
    assert "run/recovered is a recovered adapter of rank 8" in found.text
    assert record["versions"]["trl"] in found.text
    assert "as run trained" in found.text


def test_a_run_alone_tells_the_norms_of_its_adapter(published: Path) -> None:
    [adapter] = gather([published / "run"]).adapters

    assert adapter.kind == "recovered adapter"
    assert adapter.norms is not None
    assert float(np.nanmax(adapter.norms.heads["q"])) > 0


def test_the_folder_of_an_alignment_is_a_source_of_its_own(published: Path, tmp_path: Path) -> None:
    written = report([published / "work" / "aligned-run"], tmp_path / "report.html")

    assert written.sections == ("Alignment",)
    assert "unaligned, on texts.jsonl" in seen(written.path).alts[0]


def test_an_earlier_page_is_replaced_only_if_asked_for(sources: Sources, tmp_path: Path) -> None:
    report([sources.evaluation, sources.run], tmp_path / "report.html")
    (tmp_path / "report_files" / "mine.png").write_bytes(b"mine")
    before = (tmp_path / "report.html").read_bytes()

    with pytest.raises(InvalidRequestError, match="exists already"):
        report([sources.evaluation], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == before

    report([sources.evaluation], tmp_path / "report.html", overwrite=True)
    assert (tmp_path / "report.html").read_bytes() != before
    assert {path.name for path in (tmp_path / "report_files").iterdir()} == {"mine.png", "recovery.png"}


def test_overwriting_removes_what_the_earlier_page_shows_and_nothing_else(sources: Sources, tmp_path: Path) -> None:
    page, files, own = tmp_path / "report.html", tmp_path / "report_files", tmp_path / "figures"
    report([sources.evaluation, sources.run], page)
    for name in ("importance.png", "training-final.png", "study-1.png"):  # as pictures of other reports are called
        (files / name).write_bytes(b"mine")
    own.mkdir()
    shutil.copy(files / "training.png", own / "training.png")

    report([sources.evaluation], page, overwrite=True)
    assert {path.name for path in files.iterdir()} == {
        "recovery.png", "importance.png", "training-final.png", "study-1.png",
    }  # fmt: skip

    report([sources.run], page, overwrite=True)
    (files / "training.png").write_bytes(b"drawn anew by hand")
    report([sources.evaluation], page, overwrite=True, pictures=own)
    assert {path.name for path in own.iterdir()} == {"training.png", "recovery.png"}
    report([sources.evaluation], page, overwrite=True)
    assert (files / "training.png").read_bytes() == b"drawn anew by hand"


def test_requests_that_make_no_sense_are_refused_before_anything_is_written(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.json").write_text('{"rows": []}')
    refusals: list[tuple[type[Exception], str, Any]] = [
        (
            InvalidRequestError,
            "a name that ends with .html",
            lambda: report([sources.release], tmp_path / "report.pdf"),
        ),
        (InvalidRequestError, "Choose a place outside", lambda: report([sources.run], sources.plain / "report.html")),
        (
            InvalidRequestError,
            "Choose a place outside",
            lambda: report([sources.run], tmp_path / "report.html", pictures=sources.release / "pictures"),
        ),
        (InvalidRequestError, "name at least one source", lambda: report([], tmp_path / "report.html")),
        (InvalidRequestError, "a list of names", lambda: report(str(sources.release), tmp_path / "report.html")),
        (CheckpointError, "empty holds nothing", lambda: report([tmp_path / "empty"], tmp_path / "report.html")),
        (CheckpointError, "notes.txt is nothing", lambda: report([tmp_path / "notes.txt"], tmp_path / "report.html")),
        (InvalidRequestError, "has no rows", lambda: report([tmp_path / "broken.json"], tmp_path / "report.html")),
        (AccessError, "was not reached", lambda: report(["org/unknown"], tmp_path / "report.html")),
        (
            InvalidRequestError,
            "is a release; an adapter",
            lambda: report([sources.release], tmp_path / "report.html", compare=sources.release),
        ),
    ]
    for kind, message, ask in refusals:
        with pytest.raises(kind, match=re.escape(message)):
            ask()

    assert {path.name for path in tmp_path.iterdir()} == {"empty", "notes.txt", "broken.json"}


def test_a_damaged_adapter_is_refused(sources: Sources, tmp_path: Path) -> None:
    tensors = load_file(sources.plain / "adapter_model.safetensors")
    tensors[min(tensors)][0, 0] = np.nan
    broken = save_adapter(tmp_path / "broken", tensors, base="org/base")

    with pytest.raises(VerificationError, match="NaN"):
        report([sources.release, broken], tmp_path / "report.html")


def test_the_command_writes_and_says_what(sources: Sources, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ["report", str(sources.run), "--evaluation", str(sources.evaluation), "-o", str(page), "--json"]

    planned = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert (planned.exit_code, page.exists()) == (0, False)
    made = CliRunner().invoke(main, arguments)
    again = CliRunner().invoke(main, arguments)

    found = json.loads(made.stdout)
    assert found["sections"] == json.loads(planned.stdout)["sections"]
    assert found["nbytes"] == page.stat().st_size
    assert all(Path(path).is_file() for path in found["pictures"])
    assert (again.exit_code, json.loads(again.stdout)["error"]["kind"]) == (2, "InvalidRequestError")


def test_people_are_told_which_sections_lack_data(sources: Sources, tmp_path: Path) -> None:
    made = CliRunner().invoke(main, ["report", str(sources.evaluation), "-o", str(tmp_path / "page.html")])

    assert made.exit_code == 0
    assert "  Before and after recovery\n" in made.stdout
    assert "  no data: Kept heads and channels\n" in made.stdout


def test_reports_need_no_torch(sources: Sources) -> None:
    code = (
        "import sys; from loram_hub.reporting import report; "
        f"report([{str(sources.release)!r}, {str(sources.run)!r}], 'unused.html', dry_run=True); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr


def measured(sources: Sources, tmp_path: Path, *, release: str, recovered: str, name: str = "measured.json") -> Path:
    """Write an evaluation that says which files it is of; 'ours' stands for the hash of the files that are here."""
    hashes = {
        "loram.json": sha256_of(sources.release / "loram.json") if release == "ours" else release,
        "adapter_model.safetensors": sha256_of(sources.recovered / "adapter_model.safetensors")
        if recovered == "ours"
        else recovered,
    }
    parts = [
        {"part": part, "id": f"org/{part}-<b>", "commit": None, "files": {file: digest}}
        for part, (file, digest) in zip(("release", "recovered"), hashes.items(), strict=True)
    ]
    provenance = {"parts": parts, "settings": {"max_tokens": 512}, "versions": {"torch": "2.13.0"}}
    values = read_json(sources.evaluation) | {"provenance": provenance}
    base = values["rows"][0]["parameters"]
    [adapter] = gather([sources.recovered]).adapters
    for row in values["rows"]:
        if row["model"] == "base + recovered adapter":
            row["parameters"] = base + adapter.parameters
    (tmp_path / name).write_text(dump_json(values))
    return tmp_path / name


def test_an_evaluation_of_these_files_is_told_from_one_of_others(sources: Sources, tmp_path: Path) -> None:
    own = measured(sources, tmp_path, release="ours", recovered="ours")
    other = measured(sources, tmp_path, release="f" * 64, recovered="e" * 64, name="other.json")
    silent = sources.evaluation

    facts = gather([sources.release, sources.recovered], evaluations=[other, silent, own])
    contents = contents_of(facts)

    said = [sentence for sentence in contents.lead if "held-out tokens" in sentence]
    assert said[0].startswith(
        "By other.json, on 1,234 held-out tokens, another adapter than this report's, org/recovered-<b>, lowers"
    )
    assert "an adapter that it does not name" in said[1]
    assert said[2].startswith("By measured.json, on 1,234 held-out tokens, recovered lowers the loss of the base")
    [figure] = [figure for figure in contents.key_figures if figure.label == "held-out loss"]
    assert figure.note == "base with recovered; base alone: 3.0000; measured.json"
    paragraphs = [" ".join(part.paragraphs) for part in contents.sections[0].parts]
    assert "other files than those of this report: release org/release-<b> (loram.json ffffffffffff)" in paragraphs[0]
    assert "does not say which files" in paragraphs[1]
    assert "the very files of this report: release release and recovered adapter recovered" in paragraphs[2]


def test_what_was_measured_how_is_among_the_provenance(sources: Sources, tmp_path: Path) -> None:
    own = measured(sources, tmp_path, release="d" * 64, recovered="ours")

    tables = seen(report([own, sources.study], tmp_path / "report.html").path).tables

    rows = {name: text for name, text in tables["The evaluation"]}
    assert rows["release"] == "org/release-<b>"
    assert rows["SHA-256 of its loram.json"] == "d" * 64
    assert (rows["max_tokens"], rows["measured with"]) == ("512", "torch 2.13.0")
    assert ["seeds", "0, 1"] in tables["The study"]


def test_an_evaluation_of_an_adapter_of_another_size_is_called_one(sources: Sources) -> None:
    facts = gather([sources.recovered, sources.evaluation])

    assert "of another adapter than recovered" in " ".join(recovery_section(facts).parts[0].paragraphs)
    assert "none of this report's" in " ".join(contents_of(facts).lead)


def run_on(sources: Sources, folder: Path, **changes: Any) -> Path:
    """Write the record of a run on the release, with changes to its recipe."""
    record = run_record("release", "d")
    record["release"]["plan_sha256"] = open_metadata(sources.release).plan.digest
    record["recipe"] |= changes
    folder.mkdir()
    starts = [{"step": 0, "processes": 2, "micro_batch": 4}]
    (folder / "finetune.json").write_text(dump_json(record | {"starts": starts}))
    return folder


def test_the_estimate_is_that_of_all_the_settings_of_the_run(sources: Sources, tmp_path: Path) -> None:
    lora = {"r": 4, "dropout": 0.0, "targets": ["q_proj"], "masked": None}
    memory = {"gradient_checkpointing": False, "optimizer": "adamw_torch", "embedding": "cpu", "lm_head": "nf4"}
    facts = gather([sources.release, run_on(sources, tmp_path / "run", lora=lora, memory=memory)])

    shape = facts.runs[0].shape

    assert shape is not None
    assert (shape.targets, shape.dropout, shape.optimizer) == (("q_proj",), 0, "adamw_torch")
    assert not shape.checkpointing
    assert (shape.options.embedding, shape.options.lm_head, shape.processes) == ("cpu", "nf4", 2)
    [text] = memory_section(facts).parts[0].paragraphs
    assert "rank 4 on q_proj, dropout 0, adamw_torch, without gradient checkpointing, embedding: cpu" in text
    assert "as run trained" in text


@pytest.mark.parametrize("lora", [{"r": 4, "targets": ["no_such_module"]}, {"r": 10**400}, {"r": "4"}, [1], None])
def test_a_run_whose_settings_cannot_be_estimated_leaves_the_defaults(
    sources: Sources, tmp_path: Path, lora: object
) -> None:
    facts = gather([sources.release, run_on(sources, tmp_path / "run", lora=lora)])

    [text] = memory_section(facts).parts[0].paragraphs
    assert "with the default settings" in text


def test_a_run_on_another_release_of_the_same_plan_is_not_estimated(sources: Sources, tmp_path: Path) -> None:
    shutil.copytree(sources.release, tmp_path / "in-nf4")
    facts = gather([tmp_path / "in-nf4", run_on(sources, tmp_path / "run")])

    assert "with the default settings" in memory_section(facts).parts[0].paragraphs[0]


def test_a_run_that_diverged_shows_where(tmp_path: Path) -> None:
    losses: list[Any] = [3.0, 2.0, None, 10**400, 2.5, "2.0", *[2.0] * 60]
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    history += [{"step": 2, "eval_x_loss": None}, {"step": 4, "eval_x_loss": 2.0}]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finetune.json").write_text(dump_json(run_record("org/r", "d") | {"history": history}))

    found = seen(report([tmp_path / "run"], tmp_path / "report.html").path)

    assert "2 of its 65 training losses are not finite" in found.text
    assert "Not finite: 2 of 65 losses in training and 1 of 2 losses on x." in found.text
    [table] = [rows for caption, rows in found.tables.items() if caption.startswith("Losses of the fine-tuning")]
    assert [row[:2] for row in table if row[0] == "3"] == [["3", "not finite"]]


def test_the_adapter_to_compare_with_keeps_its_place(sources: Sources, tmp_path: Path) -> None:
    others = [shutil.copytree(sources.recovered, tmp_path / name / "recovered") for name in "abcde"]

    facts = gather([sources.release, *others], compare=sources.plain)
    [part] = norms_section(facts).parts

    assert [adapter.name for adapter in facts.adapters[:2]] == ["a/recovered", "b/recovered"]
    assert "Not shown, since 4 adapters lie side by side at most: d/recovered and e/recovered." in part.paragraphs
    for figure in part.figures:
        assert "plain LoRA: plain" in figure.alt
        assert "c/recovered" in figure.alt


def test_the_caller_can_name_the_model_of_an_adapter(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(layers=LAYERS)))

    [without] = gather([sources.plain]).adapters
    [named] = gather([sources.plain], base=tmp_path).adapters

    assert without.norms is None
    assert named.norms is not None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        gather([sources.plain], base=tmp_path / "..")


def test_the_hub_is_asked_once_for_what_an_adapter_names(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Busy(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        [adapter] = gather([sources.plain]).adapters
        server.shutdown()

    assert asked == ["/org/base/resolve/main/config.json"]
    assert "The Hub answered 503 for org/base" in (adapter.why_no_norms or "")


def test_a_legend_names_what_only_a_later_panel_has(sources: Sources) -> None:
    plan = open_metadata(sources.release).plan
    scores = scores_of(plan)
    bands = importance_facts(scores, name="s", method=None, releases=gather([sources.release]).releases).bands
    nothing = replace(bands["kv_heads"], pruned=np.full_like(bands["kv_heads"].pruned, np.nan))
    names: list[str] = []

    def note(picture: Figure) -> bytes:
        legend = picture.axes[0].get_legend()
        names.extend(text.get_text() for text in ([] if legend is None else legend.get_texts()))
        return b""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawings, "png", note)
        drawings.importance_picture({"kv_heads": nothing, "channels": bands["channels"]})

    assert names == ["kept", "pruned"]


def test_each_of_eight_curves_has_a_colour_and_a_marker_of_its_own() -> None:
    styles = curve_styles([str(number) for number in range(8)])

    assert len({colour for colour, _ in styles.values()}) == len({marker for _, marker in styles.values()}) == 8


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open /home/Jane Doe/models/base: no such file", "cannot open base: no such file"),
        (r"'C:\Users\Jane\m' is none", "'m' is none"),
        ("../../secret/x", "x"),
        ("org/model at https://huggingface.co/org/model", "org/model at https://huggingface.co/org/model"),
    ],
)
def test_where_things_lie_is_left_out_of_messages(text: str, shown: str) -> None:
    assert without_folders(text) == shown


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), 1e300, True, "1", None, [1]])
def test_what_is_no_number_of_use_is_none_in_any_file(value: object) -> None:
    assert finite(value) is None
    assert alignment_curve({"losses": [[0, value], [1, 1.0]]}) == ()
    assert alignment_curve({"losses": [[value, 2.0], [1, 1.0]]}) == ()
    assert held_out_curves({"held_out": [[0, {"x": value}], [value, {"x": 1.0}], [1, {"x": 1.0}]]}) == {"x": ((1, 1),)}
