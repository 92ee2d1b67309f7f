"""Estimated peak memory of a fine-tuning step against a simulated one, at the sizes of real models. No GPU is needed.

`simulated_training` says what is simulated. Compared is what tensors take, without optimizer state: what an estimate
sets aside (CUDA's context, fragmentation) and cuBLAS' workspace are left out on both sides. Configurations differ in
base, ratio, sequence, micro-batch, checkpointing, rank, dropout, targets and type. All layers run.

    python benchmarks/memory_simulation.py [--quick]

A line of JSON, and with --table a table in Markdown instead.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from measuring import report
from simulated_training import simulate

from loram_hub.architecture import architecture_of
from loram_hub.estimation import MemoryBreakdown, TrainingShape, training_memory
from loram_hub.plan import PruningSettings, planned_sizes

_GIB = 2**30
TARGET = 0.1
BASES: dict[str, dict[str, Any]] = {
    name: {
        "model_type": model_type,
        "vocab_size": words,
        "hidden_size": hidden,
        "intermediate_size": channels,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "tie_word_embeddings": False,
    }
    for name, model_type, words, hidden, channels, layers, heads, kv_heads in (
        ("Llama-2-13B", "llama", 32_000, 5120, 13_824, 40, 40, 40),
        ("Llama-2-70B", "llama", 32_000, 8192, 28_672, 80, 64, 8),
        ("Llama-3.1-8B", "llama", 128_256, 4096, 14_336, 32, 32, 8),
        ("Llama-3.1-70B", "llama", 128_256, 8192, 28_672, 80, 64, 8),
        ("Qwen3-32B", "qwen3", 151_936, 5120, 25_600, 64, 64, 8),
        ("tiny", "llama", 1_000, 64, 160, 8, 4, 2),
    )
}


@dataclass(frozen=True)
class Configuration:
    """One row."""

    base: str
    pruning_ratio: float | None
    shape: TrainingShape = field(default_factory=TrainingShape)
    quantized: bool = True


def _both(base: str, ratio: float | None) -> list[Configuration]:
    return [Configuration(base, ratio, TrainingShape(micro_batch=batch)) for batch in (1, 4)]


CONFIGURATIONS = [
    *(row for base in ("Llama-2-70B", "Llama-3.1-70B") for ratio in (0.75, 0.85, 0.95) for row in _both(base, ratio)),
    *(row for base in ("Llama-3.1-8B", "Llama-2-13B") for ratio in (None, 0.65) for row in _both(base, ratio)),
    Configuration("Llama-3.1-70B", 0.85, TrainingShape(sequence_length=2048)),
    Configuration("Llama-3.1-70B", 0.85, TrainingShape(sequence_length=4096, rank=64)),
    Configuration("Llama-3.1-70B", 0.85, TrainingShape(checkpointing=False)),
    Configuration("Llama-2-70B", 0.85, TrainingShape(rank=64, dropout=0.0)),
    Configuration("Llama-2-70B", 0.85, TrainingShape(targets=("q_proj", "v_proj"))),
    Configuration("Llama-3.1-8B", None, TrainingShape(micro_batch=2, sequence_length=1024, checkpointing=False)),
    Configuration("Llama-3.1-8B", 0.65, TrainingShape(micro_batch=2), quantized=False),
    Configuration("Qwen3-32B", 0.85, TrainingShape(micro_batch=2, sequence_length=1024)),
]
QUICK = [
    Configuration("tiny", ratio, TrainingShape(sequence_length=64, checkpointing=checkpointing))
    for ratio in (None, 0.5)
    for checkpointing in (True, False)
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimated against simulated peak memory of a fine-tuning step.")
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that the script works")
    parser.add_argument("--table", action="store_true", help="print a table in Markdown instead of JSON")
    options = parser.parse_args()
    rows = [compare(configuration) for configuration in (QUICK if options.quick else CONFIGURATIONS)]
    if options.table:
        print(table(rows))
        return
    worst = max(abs(row["predicted_bytes"] / row["simulated_bytes"] - 1) for row in rows)
    report(
        "memory_simulation",
        quick=options.quick,
        figures={"rows": {str(number): row for number, row in enumerate(rows)}, "largest_error": worst},
        target=f"every prediction within {TARGET:.0%} of the simulated peak",
        met=worst <= TARGET,
    )


def compare(row: Configuration) -> dict[str, Any]:
    """Estimate and simulate one configuration."""
    config = BASES[row.base]
    architecture = architecture_of(config)
    whole = (architecture.whole_layer,) * architecture.num_hidden_layers
    ratio = row.pruning_ratio
    layers = whole if ratio is None else planned_sizes(architecture, PruningSettings(pruning_ratio=ratio))
    estimated = training_memory(architecture, layers, row.shape, quantized=row.quantized)
    simulated = simulate(config, layers, row.shape, quantized=row.quantized)
    return {
        "base": row.base,
        "pruning_ratio": ratio,
        "type": "nf4" if row.quantized else "bf16",
        "sequence_length": row.shape.sequence_length,
        "micro_batch": row.shape.micro_batch,
        "rank": row.shape.rank,
        "dropout": row.shape.dropout,
        "targets": "all" if row.shape.targets is None else ",".join(row.shape.targets),
        "checkpointing": row.shape.checkpointing,
        "predicted_bytes": estimated.tensors - estimated.optimizer,
        "simulated_bytes": simulated.peak,
        "predicted_standing": _standing(estimated),
        "simulated_standing": simulated.standing,
        "estimate_bytes": estimated.total,
        "moment": estimated.moment,
        "operation": simulated.operation,
    }


def _standing(estimated: MemoryBreakdown) -> int:
    return sum(
        getattr(estimated, name)
        for name in ("projections", "scales", "embedding", "lm_head", "rest", "masks", "adapter")
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as Markdown."""
    lines = [
        "| base | ratio | type | tokens x batch | rank, dropout | targets | checkpointing | tensors: predicted | "
        "simulated | error | whole estimate |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = row["predicted_bytes"] / row["simulated_bytes"] - 1
        cells = [
            row["base"],
            "-" if row["pruning_ratio"] is None else f"{row['pruning_ratio']:g}",
            row["type"],
            f"{row['sequence_length']} x {row['micro_batch']}",
            f"{row['rank']}, {row['dropout']:g}",
            row["targets"],
            "yes" if row["checkpointing"] else "no",
            f"{row['predicted_bytes'] / _GIB:.2f}",
            f"{row['simulated_bytes'] / _GIB:.2f}",
            f"{error:+.1%}",
            f"{row['estimate_bytes'] / _GIB:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
