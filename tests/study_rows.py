"""Rows of a study that nobody has run, for tests of what is made of rows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from loram_hub.studies.records import Row

BASE_PARAMETERS = 134_515_008
BASE_LOSS, OTHER_LOSS = 4.0, 3.0
METHODS: Mapping[str, Sequence[float | None]] = {"rand": (0.35, 0.7), "stru": (0.35, 0.7), "semi": (None,)}
"""Ratios by method."""


def study_rows(
    *,
    name: str = "made-up",
    seeds: Sequence[int] = (0, 1, 2),
    methods: Mapping[str, Sequence[float | None]] = METHODS,
    steps: Sequence[int] = (0, 4, 12),
    data: Sequence[str] = ("tasks",),
    other: str | None = "texts",
    quantizations: Sequence[str] = ("",),
) -> list[Row]:
    """Return rows as a study with these axes would measure; losses are drawn, the same ones in every call.

    Each training set has a held-out set, `held-out <name>`; `other` is one that is in domain for none.
    """
    draw = random.Random(0)
    sets = {f"held-out {one}": one for one in data} | ({} if other is None else {other: None})
    cells: list[dict[str, Any]] = [{"kind": "base", "seed": 0}]
    for seed in seeds:
        for quantization in quantizations:
            for one in data:
                same = {"seed": seed, "data": one, "quantization": quantization}
                cells += [{"kind": kind, **same} for kind in ("plain", "whole layers")]
                cells += [
                    {"kind": "loram", "method": method, "ratio": ratio, "alignment_steps": count, **same}
                    for method, ratios in methods.items()
                    for ratio in ratios
                    for count in steps
                ]
    return [row for cell in cells for row in _rows(name, cell, sets, draw)]


def _rows(name: str, cell: Mapping[str, Any], sets: Mapping[str, str | None], draw: random.Random) -> list[Row]:
    kind, ratio = cell["kind"], cell.get("ratio")
    is_loram = kind == "loram"
    facts: dict[str, Any] = {
        "study": name,
        "cell": hashlib.sha256(repr(sorted(cell.items())).encode()).hexdigest()[:12],
        "method": "",
        "ratio": None,
        "importance": {"rand": "random", "stru": "taylor"}.get(cell.get("method", ""), ""),
        "pattern": "4:8" if cell.get("method") == "semi" else "",
        "alignment_steps": 0,
        "alignment_tokens": 1024 * cell.get("alignment_steps", 0),
        "quantization": "",
        "masked": False,
        "data": "",
        "parameters": int(BASE_PARAMETERS * (1 - 0.7 * (ratio or 0.5))) if is_loram else BASE_PARAMETERS,
        "making_seconds": draw.uniform(20, 30) if is_loram else None,
        "tuning_seconds": None if kind == "base" else draw.uniform(80, 90) + (0 if is_loram else 30),
        "peak_memory_bytes": None if kind == "base" else int(draw.uniform(1.5e9, 1.6e9)) + (0 if is_loram else 10**9),
        "threads": 2,
        **cell,
    }
    rows = []
    for held_out, of in sets.items():
        in_domain = of is not None and of == facts["data"]
        base = BASE_LOSS if of is not None else OTHER_LOSS
        place = {"held_out": held_out, "in_domain": in_domain, "tokens": 1000, **facts}
        if kind == "base":
            rows.append(Row(model="base", loss=base, **place))
            continue
        worse = {"plain": 0.0, "whole layers": 0.15}.get(kind, 0.5 * (ratio or 0.5) - 0.004 * facts["alignment_steps"])
        recovered = (3.1 + worse if in_domain else base + 0.05) + draw.gauss(0, 0.03)
        rows.append(Row(model="base + recovered adapter", loss=recovered, **place))
        if is_loram:
            rows.append(Row(model="pruned", loss=recovered + 2 + draw.random(), **place))
            rows.append(Row(model="pruned + adapter", loss=recovered + 1 + draw.random() / 2, **place))
    return rows
