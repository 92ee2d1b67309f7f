"""Sparse releases: single weights of the projections are removed, by SparseGPT, Wanda or magnitude.

LoRAM-Semi and LoRAM-Unst (arXiv 2502.13533). All shapes stay; a mask says which weights are kept.

    settings      which method, how much of which pattern; counts: what is kept then
    selection     which weights have the lowest scores, exactly as many as asked
    statistics    what a method needs to know of a matrix's inputs
    sparsegpt     SparseGPT of one matrix: mask and updated weights (arXiv 2301.00774)
    matrices      the three methods for all matrices that have the same inputs
    layers        the model streamed, layer after layer, each fed by the pruned ones before it
    finished      layers that are done, on disk: what a killed run goes on from
    sparsifying   `sparsify` and `check_sparsify`, which put all this together

Settings and counts are free of torch; the rest loads on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from loram_hub.sparsification.counts import asked_counts as asked_counts
from loram_hub.sparsification.settings import SparsitySettings as SparsitySettings

if TYPE_CHECKING:
    from loram_hub.sparsification.sparsifying import check_sparsify as check_sparsify
    from loram_hub.sparsification.sparsifying import sparsify as sparsify

__all__ = ["SparsitySettings", "asked_counts", "check_sparsify", "sparsify"]

_HOME = {"check_sparsify": "sparsifying", "sparsify": "sparsifying"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
