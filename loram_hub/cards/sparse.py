"""What the card of a sparse release says of its masks and sizes."""

from __future__ import annotations

from collections.abc import Iterator

from loram_hub.architecture import Architecture
from loram_hub.cards.escaping import Markdown
from loram_hub.cards.wording import count, size
from loram_hub.errors import InvalidRequestError
from loram_hub.estimation import SparseCounts, mask_memory
from loram_hub.manifest import Sparsification
from loram_hub.masks import WEIGHT_MASKS, parse_pattern
from loram_hub.plan import PruningSettings, parameter_counts, planned_sizes
from loram_hub.release import Release
from loram_hub.release.contents import is_weights

_COMPARED_RATIOS = (0.65, 0.75, 0.85)
"""Pruning ratios of the paper's structured releases, which a sparse one is shown next to."""


def sparse_facts(release: Release, pruning: Sparsification, counts: SparseCounts) -> dict[str, object]:
    """Return what the templates say of a sparse release, besides what they say of any.

    Args:
        release: opened; its weights need not be there.
        pruning: how it was made.
        counts: of its parameters and bytes.
    """
    files = release.manifest.files
    pattern = parse_pattern(pruning.pattern)
    stored = counts.nf4_bytes if release.is_quantized else counts.bf16_bytes
    packed = counts.packed_nf4_bytes if release.is_quantized else counts.packed_bf16_bytes
    return {
        "is_whole": False,
        "label": Markdown(pruning.label),
        "settings": _settings(pruning),
        "matrices": count(len(release.architecture.projections)),
        "kept": count(counts.kept_weights),
        "prunable": count(counts.prunable_weights),
        "share_kept": Markdown(f"{1 - counts.sparsity:.2%}"),
        "share_removed": Markdown(f"{counts.sparsity:.2%}"),
        "where": Markdown("anywhere" if pattern.of is None else f"{pattern.kept} of every {pattern.of} inputs"),
        "mask_bits": Markdown(f"{counts.mask_bits:.3g}"),
        "mask_bytes": size(counts.mask_bytes),
        "mask_memory": size(mask_memory(release.architecture)),
        "packed_bf16": size(counts.packed_bf16_bytes),
        "packed_nf4": size(counts.packed_nf4_bytes),
        "packed": size(packed),
        "packed_saving": Markdown(f"{1 - packed / (stored + counts.mask_bytes):.0%}"),
        "stored_weights": size(sum(entry.size for name, entry in files.items() if is_weights(name))),
        "stored_masks": size(files[WEIGHT_MASKS].size if WEIGHT_MASKS in files else counts.mask_bytes),
        "structured": list(_structured_rows(release.architecture)),
    }


def _settings(pruning: Sparsification) -> Markdown | None:
    """Show the settings of SparseGPT; the other methods have none."""
    if pruning.dampening is None or pruning.block_size is None:
        return None
    return Markdown(f"dampening {pruning.dampening:g}, blocks of {pruning.block_size:,} columns")


def _structured_rows(architecture: Architecture) -> Iterator[tuple[Markdown, ...]]:
    """Parameters and bytes of structured releases of the same base, as far as it has the layers and heads for them."""
    for ratio in _COMPARED_RATIOS:
        try:
            layers = planned_sizes(architecture, PruningSettings(pruning_ratio=ratio))
        except InvalidRequestError:  # too few layers, or nothing would be left of one
            continue
        counts = parameter_counts(architecture, layers)
        yield (
            Markdown(f"{ratio:g}"),
            count(counts.pruned_parameters),
            size(counts.bf16_bytes),
            size(counts.nf4_bytes),
        )
