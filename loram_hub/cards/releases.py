"""The card of a release: its facts, for the template `release.md.j2`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from loram_hub.cards.escaping import Markdown, code, hub_link, is_hub_id, json_block
from loram_hub.cards.evaluations import check_identity, read_evaluation
from loram_hub.cards.folders import Card, notice_files
from loram_hub.cards.history import history_of
from loram_hub.cards.metadata import LORAM_TAG, Described, Relation, card_data, eval_results_files
from loram_hub.cards.pictures import (
    ALIGNMENT_LOSS,
    KEPT_GROUPS,
    alignment_curve,
    alignment_picture,
    held_out_curves,
    kept_groups_picture,
)
from loram_hub.cards.project import NOTEBOOK, project_file
from loram_hub.cards.rendering import render_card
from loram_hub.cards.sparse import sparse_facts
from loram_hub.cards.wording import (
    MAX_ROWS,
    check_repo_id,
    count,
    evaluation_line,
    file_rows,
    licence_values,
    loss_rows,
    size,
    task_values,
    title_of,
)
from loram_hub.estimation import SparseCounts, sparse_counts
from loram_hub.files import sha256_of
from loram_hub.licences import Licence
from loram_hub.manifest import MANIFEST, Manifest, Pruning, Sparsification
from loram_hub.masks import parse_pattern
from loram_hub.plan import ParameterCounts, parameter_counts
from loram_hub.release import Release

TEMPLATE = "release.md.j2"
_NOT_IN_ONE_LINE = frozenset({"losses", "held_out", "corpora", "refit", "run_sha256"})
"""Of a manifest's `alignment`: shown in rows of their own, or of no use to a reader."""
_REFITTED = "the output projections of the rest were refitted"


def release_card(
    release: Release,
    *,
    repo_id: str | None,
    licence: Licence,
    evaluation: Mapping[str, object] | None = None,
    documents: Mapping[str, str] | None = None,
) -> Card:
    """Make the card of a release.

    Args:
        release: opened; its weights need not be there.
        repo_id: Hub id under which it will be published, if it is known.
        licence: of the base model.
        evaluation: the JSON of `loram eval --json`, if it was evaluated.
        documents: licence texts that will be published with it and are not in the folder, by name.

    Returns:
        README.md, pictures, evaluation results and, where the licence asks for one that is not there, a Notice file.

    Raises:
        InvalidRequestError: `repo_id` is no Hub id, or the evaluation is of another model.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    check_repo_id(repo_id)
    manifest, counts = release.manifest, _counts(release)
    known = {"base": counts.original_parameters, "pruned": counts.pruned_parameters}
    measured = None if evaluation is None else read_evaluation(evaluation, parameters=known)
    if evaluation is not None:
        check_identity(evaluation, "release", {MANIFEST: sha256_of(Path(release.folder) / MANIFEST)})
    curve = alignment_curve(manifest.alignment)
    described = _described(release, repo_id, licence)
    # The masks of a sparse release are equally dense in every matrix: there is nothing to see.
    is_cut = counts.pruned_parameters < counts.original_parameters and not release.is_sparse
    pictures = {KEPT_GROUPS: kept_groups_picture(release.plan)} if is_cut else {}
    if curve:
        pictures[ALIGNMENT_LOSS] = alignment_picture(curve, held_out_curves(manifest.alignment))
    values = {
        **_facts(release, counts),
        **_pruning_facts(release, counts),
        **licence_values(licence, _changes(manifest)),
        "title": title_of(repo_id, f"LoRAM release of {manifest.base.id}"),
        "repo": Markdown(repo_id or "path/to/this/folder"),
        "notebook": project_file(NOTEBOOK),
        "losses": loss_rows(measured),
        "evaluation": evaluation_line(measured),
        **task_values(measured),
        "has_curve": bool(curve),
        "files": file_rows(_hashes(release)),
        "unlisted": max(0, len(manifest.files) + 1 - MAX_ROWS),
    }
    return Card(
        text=render_card(TEMPLATE, card_data(described, measured), values),
        files={
            **pictures,
            **eval_results_files(described, measured),
            **notice_files(release.folder, licence, documents),
        },
    )


def _described(release: Release, repo_id: str | None, licence: Licence) -> Described:
    manifest = release.manifest
    return Described(
        title=repo_id.rpartition("/")[2] if repo_id else "LoRAM release",
        repo_id=repo_id,
        base_id=manifest.base.id,
        relation=_relation(release),
        library="loram-hub",  # with `transformers`, the Hub would offer to serve a training proxy
        licence=licence,
        tags=(
            LORAM_TAG,
            "pruned",
            *(("sparse", manifest.pruning.method) if release.is_sparse else ()),
            *(("bitsandbytes", "4-bit") if release.is_quantized else ()),
        ),
        datasets=tuple(sorted({hub_id for name in _corpora(manifest) if (hub_id := _hub_dataset(name))})),
        model="pruned",
    )


def _relation(release: Release) -> Relation:
    """Choose among the Hub's four relations, which know no pruning.

    NF4 is `quantized`. Aligned weights were trained: `finetune`. Pruned weights that were not trained are neither
    adapter, merge nor quantized, and `finetune` is what the Hub assumes of anything else.
    """
    return "quantized" if release.is_quantized else "finetune"


def _corpora(manifest: Manifest) -> tuple[str, ...]:
    """Return names of the data that alignment and calibration used, as far as the manifest has them."""
    calibration = (manifest.pruning.calibration or {}).get("dataset")
    return (*history_of(manifest.alignment).corpora, *([calibration] if isinstance(calibration, str) else []))


def _hub_dataset(name: str) -> str | None:
    """Return the Hub id in a corpus's name, `org/name` or `org/name:config`; None for files, which have no owner."""
    hub_id = name.partition(":")[0]
    return hub_id if is_hub_id(hub_id) else None


def _corpus(name: str) -> Markdown:
    hub_id = _hub_dataset(name)
    if hub_id is None:
        return code(name)
    config = name.removeprefix(hub_id).removeprefix(":")
    return Markdown(hub_link(hub_id, kind="datasets/") + (f" {code(config)}" if config else ""))


def _counts(release: Release) -> ParameterCounts | SparseCounts:
    pruning = release.manifest.pruning
    if isinstance(pruning, Sparsification):
        pattern = parse_pattern(pruning.pattern)
        return sparse_counts(release.architecture, pattern, kept_weights=pruning.kept_weights)
    return parameter_counts(release.architecture, release.plan.layers)


def _pruning_facts(release: Release, counts: ParameterCounts | SparseCounts) -> dict[str, object]:
    pruning = release.manifest.pruning
    if isinstance(pruning, Sparsification):
        assert isinstance(counts, SparseCounts)
        return sparse_facts(release, pruning, counts)
    assert isinstance(counts, ParameterCounts)
    return {
        "is_whole": counts.pruned_parameters == counts.original_parameters,
        "ratio": Markdown(f"{pruning.pruning_ratio:g}"),
        "method": pruning.method,
        "importance": pruning.importance,
        "whole_layers": counts.kept.count(release.architecture.whole_layer),
        "heads": _range(counts.kept[layer].kv_heads for layer in release.plan.kept),
        "all_heads": release.architecture.num_key_value_heads,
        "channels": _range(counts.kept[layer].channels for layer in release.plan.kept),
        "all_channels": count(release.architecture.intermediate_size),
    }


def _facts(release: Release, counts: ParameterCounts | SparseCounts) -> dict[str, object]:
    manifest, pruning = release.manifest, release.manifest.pruning
    history = history_of(manifest.alignment)
    return {
        "base": hub_link(manifest.base.id),
        "commit": manifest.base.commit,
        "base_is_local": not is_hub_id(manifest.base.id),
        "is_sparse": release.is_sparse,
        "is_quantized": release.is_quantized,
        "is_sixteen_bit": not release.is_quantized and _dtype(release) in ("bfloat16", "float16"),
        "is_aligned": history.training is not None,
        "is_refitted": history.refit is not None,
        "ends_with_refit": history.ends_with_refit,
        "may_be_trained": "saved" in manifest.recipe,
        "seed": pruning.seed,
        "layers": release.architecture.num_hidden_layers,
        "calibration": _pairs(pruning.calibration),
        "alignment": _pairs(
            {key: value for key, value in (history.training or {}).items() if key not in _NOT_IN_ONE_LINE}
        ),
        "refit": _pairs(history.refit),
        "held_out": _held_out(manifest),
        "corpora": [_corpus(name) for name in _corpora(manifest)[:20]],
        "plan_sha256": release.plan.digest,
        "config_sha256": manifest.base.config_sha256,
        "tools": _pairs(manifest.tools),
        "recipe": json_block(manifest.recipe),
        "base_parameters": count(counts.original_parameters),
        "base_bytes": size(2 * counts.original_parameters),
        "parameters": count(counts.pruned_parameters),
        "reduction": Markdown(f"{counts.reduction:.2f}"),
        "bf16_bytes": size(counts.bf16_bytes),
        "nf4_bytes": size(counts.nf4_bytes),
        "file_bytes": size(sum(entry.size for entry in manifest.files.values())),
    }


def _dtype(release: Release) -> object:
    return release.config.get("dtype", release.config.get("torch_dtype"))


def _held_out(manifest: Manifest) -> Markdown | None:
    """Show what alignment did to the loss on held-out texts of each corpus."""
    curves = held_out_curves(manifest.alignment).items()
    shown = [f"{code(name)} {points[0][1]:.4f} to {points[-1][1]:.4f}" for name, points in curves if len(points) > 1]
    return Markdown(", ".join(shown)) if shown else None


def _changes(manifest: Manifest) -> Markdown:
    history = history_of(manifest.alignment)
    refitted = [f"{_REFITTED} in closed form"] if history.refit is not None else []
    trained = ["the rest was trained further"] if history.training is not None or "saved" in manifest.recipe else []
    done = [
        f"its files were modified: {_removal(manifest)}",
        *((*trained, *refitted) if history.ends_with_refit else (*refitted, *trained)),
        *(["quantized to NF4"] if manifest.quantization is not None else []),
    ]
    return Markdown(", ".join(done))


def _removal(manifest: Manifest) -> str:
    pruning = manifest.pruning
    if manifest.parameters == manifest.base.parameters:
        return "other settings and names, no weight was removed"
    if isinstance(pruning, Pruning):
        return "rows and columns of the weights were removed"
    updated = ", and others changed to make up for it" if pruning.method == "sparsegpt" else ""
    return f"single weights were set to zero{updated}"


def _range(numbers: Iterable[int]) -> Markdown:
    found = sorted(numbers) or [0]
    return count(found[0]) if found[0] == found[-1] else Markdown(f"{found[0]:,} to {found[-1]:,}")


def _pairs(values: Mapping[str, object] | None) -> Markdown | None:
    """Show an untrusted mapping of simple values in one line; None if there is none."""
    simple = {key: value for key, value in (values or {}).items() if isinstance(value, str | int | float)}
    return Markdown(", ".join(code(f"{key} {value}") for key, value in [*simple.items()][:20])) if simple else None


def _hashes(release: Release) -> dict[str, str]:
    manifest = Path(release.folder) / MANIFEST
    return {MANIFEST: sha256_of(manifest)} | {
        name: entry.sha256 for name, entry in sorted(release.manifest.files.items())
    }
