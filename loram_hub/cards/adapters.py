"""The card of an adapter of full size: its facts, for the template `adapter.md.j2`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from loram_hub.adapter import (
    CONFIG,
    MASKED_FIELD,
    RECORD,
    RECOVERED,
    VLLM_RANKS,
    WEIGHTS,
    AdapterConfig,
    AdapterRecord,
    max_lora_rank,
    parse_config,
    read_record,
    refuse_pruned,
)
from loram_hub.cards.escaping import Markdown, code, hub_link, is_hub_id
from loram_hub.cards.evaluations import check_adapter_size, check_identity, read_evaluation
from loram_hub.cards.folders import Card, notice_files
from loram_hub.cards.metadata import LORAM_TAG, Described, card_data, eval_results_files
from loram_hub.cards.rendering import render_card
from loram_hub.cards.wording import (
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
from loram_hub.errors import VerificationError
from loram_hub.files import read_json, sha256_of
from loram_hub.licences import Licence
from loram_hub.tensors import TensorInfo, read_headers

TEMPLATE = "adapter.md.j2"

# What goes into lines of Python and shell on the card.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFacts:
    """An adapter, as far as its card goes."""

    folder: Path
    base_id: str
    """Hub id of the base model, or its folder's name; safe to show."""
    config: AdapterConfig
    tensors: Mapping[str, TensorInfo]
    """The factors by name, without their numbers."""
    record: AdapterRecord | None
    """Where it comes from; None if `recover` did not write it."""

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        ranks = (info.shape[0] for name, info in self.tensors.items() if name.endswith(".lora_A.weight"))
        return max(ranks, default=self.config.r)

    @property
    def parameters(self) -> int:
        """Numbers in all factors."""
        return sum(prod(info.shape) for info in self.tensors.values())

    @property
    def dtypes(self) -> list[str]:
        """Types of the factors."""
        return sorted({info.dtype for info in self.tensors.values()})


def read_facts(folder: Path) -> AdapterFacts:
    """Read what a card says of an adapter: config, record and header, no factors.

    Raises:
        VerificationError: one of them is damaged, or they name different base models.
        UnsupportedAdapterError: it fits a pruned model and was not recovered yet.
    """
    config = parse_config(read_json(folder / CONFIG), source=str(folder / CONFIG))
    found = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    record = read_record(folder) if found.get("kind") == RECOVERED else None
    if record is None:
        refuse_pruned(folder)
    base = config.base or ""
    if record is not None and (record.base_id, record.base_commit) != (config.base, config.revision):
        raise VerificationError(
            f"{RECORD} of {folder} names the base {record.base_id!r} at {record.base_commit!r}, {CONFIG} names "
            f"{base[:100]!r} at {str(config.revision)[:100]!r}. Recover the adapter again."
        )
    if not is_hub_id(base) and _NAME.fullmatch(base) is None:
        raise VerificationError(f"{folder / CONFIG} names the base {base[:100]!r}; a Hub id or a plain name is needed.")
    if config.revision is not None and _REVISION.fullmatch(config.revision) is None:
        raise VerificationError(
            f"{folder / CONFIG} has revision {config.revision[:100]!r}, which is none of the Hub's."
        )
    return AdapterFacts(
        folder=folder, base_id=base, config=config, tensors=read_headers(folder / WEIGHTS), record=record
    )


def adapter_card(
    adapter: AdapterFacts,
    *,
    repo_id: str | None,
    licence: Licence,
    evaluation: Mapping[str, object] | None = None,
    documents: Mapping[str, str] | None = None,
) -> Card:
    """Make the card of an adapter.

    Args:
        adapter: from `read_facts`.
        repo_id: Hub id under which it will be published, if it is known.
        licence: of the base model.
        evaluation: the JSON of `loram eval --json`, if it was evaluated.
        documents: licence texts that will be published with it and are not in the folder, by name.

    Returns:
        README.md, evaluation results and, where the licence asks for one that is not there, a Notice file.

    Raises:
        InvalidRequestError: `repo_id` is no Hub id, or the evaluation is malformed or of another adapter.
        MissingDependencyError: jinja2 is not installed.
    """
    check_repo_id(repo_id)
    measured = None if evaluation is None else read_evaluation(evaluation, parameters={})
    if evaluation is not None and measured is not None:
        check_adapter_size(measured, adapter.parameters)
        check_identity(evaluation, "recovered", {name: sha256_of(adapter.folder / name) for name in (CONFIG, WEIGHTS)})
    described = Described(
        title=repo_id.rpartition("/")[2] if repo_id else "LoRAM adapter",
        repo_id=repo_id,
        base_id=adapter.base_id,
        relation="adapter",
        library="peft",
        licence=licence,
        tags=(LORAM_TAG, "lora") if adapter.record is not None else ("lora",),
        model="base + recovered adapter",
    )
    changes = Markdown("low-rank factors are added to its weights; none of its files is in this repository")
    values = {
        **_values(adapter),
        **licence_values(licence, changes),
        "title": title_of(repo_id, f"LoRA adapter for {adapter.base_id}"),
        "repo": Markdown(repo_id or "path/to/this/folder"),
        "name": Markdown(repo_id.rpartition("/")[2] if repo_id else "my-adapter"),
        "losses": loss_rows(measured),
        "evaluation": evaluation_line(measured),
        **task_values(measured),
    }
    return Card(
        text=render_card(TEMPLATE, card_data(described, measured), values),
        files={**eval_results_files(described, measured), **notice_files(adapter.folder, licence, documents)},
    )


def _values(adapter: AdapterFacts) -> dict[str, object]:
    config, record, targets = adapter.config, adapter.record, adapter.config.target_modules
    names = (CONFIG, WEIGHTS, *((RECORD,) if record is not None else ()))
    return {
        "base": hub_link(adapter.base_id),
        "base_id": Markdown(adapter.base_id),
        "base_is_local": not is_hub_id(adapter.base_id),
        "revision": None if config.revision is None else Markdown(config.revision),
        "revision_shown": None if config.revision is None else code(config.revision),
        "is_recovered": record is not None,
        "rank": adapter.rank,
        "served_rank": max_lora_rank(adapter.rank) if adapter.rank <= VLLM_RANKS[-1] else None,
        "alpha": _alpha(config),
        "targets": [code(name) for name in ((targets,) if isinstance(targets, str) else targets or ())[:20]],
        "parameters": count(adapter.parameters),
        "dtypes": Markdown(", ".join(adapter.dtypes)),
        "file_bytes": size((adapter.folder / WEIGHTS).stat().st_size),
        "release": None if record is None else hub_link(record.release_id),
        "release_commit": None if record is None else record.release_commit,
        "plan_sha256": None if record is None else record.plan_sha256,
        "was_masked": record is not None and record.trained.get(MASKED_FIELD) is True,
        "trained_rank": None if record is None else record.trained["r"],
        "trained_alpha": None if record is None else record.trained["lora_alpha"],
        "files": file_rows({name: sha256_of(adapter.folder / name) for name in names}),
    }


def _alpha(config: AdapterConfig) -> Markdown:
    """Show alpha with whatever else decides how strongly the factors count."""
    parts = [f"{config.lora_alpha:g}"]
    if config.use_rslora:
        parts.append("scaled by alpha / sqrt(r) (rsLoRA)")
    if config.rank_pattern or config.alpha_pattern:
        parts.append("some modules have a rank or an alpha of their own (see adapter_config.json)")
    return Markdown("; ".join(parts))
