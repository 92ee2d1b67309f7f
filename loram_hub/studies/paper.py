"""Figures that the LoRAM paper prints, for comparison; nothing here was measured by this project."""

from __future__ import annotations

from loram_hub.studies.cells import Entry
from loram_hub.studies.tables import Table

PAPER = "LoRAM, arXiv 2502.13533"
ALIGNMENT_STEPS, FINE_TUNING_STEPS, BATCH, SEQUENCE = 1_600, 400, 128, 512
"""The paper's budgets: steps of alignment and of fine-tuning, sequences of a step, tokens of a sequence."""


def paper_table(study: str) -> Table | None:
    """Return what the paper prints for a ready-made study; None if there is nothing that compares.

    Args:
        study: name of the study.
    """
    return _TABLES.get(study)


def _table(name: str, caption: str, columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...], note: str) -> Table:
    return Table(
        name=f"paper-{name}",
        caption=caption,
        columns=columns,
        rows=tuple(tuple(Entry(value=value) for value in row) for row in rows),
        note=note,
    )


_TABLES = {
    "methods": _table(
        "methods",
        f"What the paper prints for downstream tasks after fine-tuning on OpenHermes ({PAPER}, tables 1 to 3).",
        ("model served", "GSM8K (%)", "MathQA (%)"),
        (
            ("LLaMA-2-13B, untouched", "24.26", "32.60"),
            ("LLaMA-2-7B, plain LoRA", "22.82", "29.61"),
            ("LLaMA-2-13B, LoRAM-Rand 0.65", "27.22", "33.77"),
            ("LLaMA-2-13B, LoRAM-Stru 0.65", "24.64", "33.80"),
            ("LLaMA-2-13B, LoRAM-Semi 4:8", "36.92", "31.76"),
            ("LLaMA-2-13B, LoRAM-Unst 0.55", "31.92", "30.12"),
            ("LLaMA-2-70B, untouched", "52.01", "39.53"),
            ("LLaMA-2-13B, plain LoRA", "36.69", "32.03"),
            ("LLaMA-2-70B, QLoRAM-Rand 0.75", "57.62", "39.66"),
            ("LLaMA-2-70B, QLoRAM-Stru 0.75", "57.16", "39.77"),
        ),
        "One seed; higher is better.",
    ),
    "ratios": _table(
        "ratios",
        f"Parameters that the paper counts for LLaMA-2-70B ({PAPER}, tables 4 to 6).",
        ("pruning ratio", "parameters", "times fewer"),
        (
            ("untouched", "68,976,648,192", "1.00"),
            ("0.65", "28,099,436,544", "2.45"),
            ("0.75", "21,488,738,304", "3.21"),
            ("0.85", "16,272,924,672", "4.24"),
            ("0.95", "9,662,226,432", "7.14"),
        ),
        "The paper multiplies the reduction by four for NF4.",
    ),
    "cost": _table(
        "cost",
        f"What the paper prints for the cost of fine-tuning ({PAPER}, table 8).",
        ("model trained on", "peak memory (MiB)", "time (s)"),
        (
            ("LLaMA-2-7B, plain LoRA", "30,517", "134.3"),
            ("LLaMA-2-13B, plain LoRA", "51,661", "206.1"),
            ("LLaMA-2-13B, LoRAM-Stru 0.65", "29,799", "147.9"),
        ),
        "On an A100: 1,024 examples of 512 tokens, steps of 128 examples, 4 at a time.",
    ),
}
