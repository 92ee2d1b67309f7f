"""What commands print: results on stdout, what to do next on stderr."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click


def print_result(result: Mapping[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """Print a result as one JSON document, or as `show` does for people."""
    if as_json:
        print_json(result)
    else:
        show()


def print_json(result: Mapping[str, Any]) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(result, indent=2))


def jsonable(value: Any) -> Any:  # noqa: ANN401 (any record's fields)
    """Turn a record's fields into what JSON can hold."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def suggest(command: str, *arguments: object) -> None:
    """Say what to run next."""
    click.echo(f"Next: {' '.join([command, *(shlex.quote(str(argument)) for argument in arguments)])}", err=True)


def size_text(nbytes: int) -> str:
    """Write a number of bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} bytes"


def print_counts(counts: Mapping[str, Any]) -> None:
    """Print parameters and bytes, and what each layer keeps or what the masks of single weights take."""
    is_sparse = "mask_bytes" in counts
    print_table(None, [*_parameter_rows(counts), *(_sparse_rows(counts) if is_sparse else _size_rows(counts))])
    for first, last, sizes in _runs(counts.get("kept", ())):
        layers = f"layer {first}" if first == last else f"layers {first}-{last}"
        click.echo(f"  {layers}: {sizes[0]} KV heads, {sizes[1]:,} MLP channels")
    if is_sparse:
        click.echo("Zeros take memory as any other number does: training on it takes what training on the base takes.")


def _parameter_rows(counts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("parameters before", f"{counts['original_parameters']:,}"),
        ("parameters after", f"{counts['pruned_parameters']:,}"),
        ("reduction", f"{counts['reduction']:.2f}x  (the paper's x4 for NF4: {counts['paper_reduction']:.2f}x)"),
    ]


def _size_rows(counts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("weights in bf16", size_text(counts["bf16_bytes"])),
        ("weights in NF4", f"{size_text(counts['nf4_bytes'])}  (embeddings and lm_head in bf16)"),
        (
            "the paper's NF4 figure",
            f"{counts['paper_nf4_gib']:.2f} GiB  (half a byte for every parameter, embeddings too)",
        ),
    ]


def _sparse_rows(counts: Mapping[str, Any]) -> list[tuple[str, str]]:
    pattern = counts["pattern"]
    where = "anywhere" if pattern == "unstructured" else f"{pattern.replace(':', ' of every ')} inputs"
    kept, prunable = counts["kept_weights"], counts["prunable_weights"]
    packed, in_nf4 = size_text(counts["packed_bf16_bytes"]), size_text(counts["packed_nf4_bytes"])
    return [
        ("kept in projections", f"{kept:,} of {prunable:,} weights ({kept / prunable:.2%}), {where}"),
        ("weights in bf16", f"{size_text(counts['bf16_bytes'])}  (zeros included)"),
        ("weights in NF4", f"{size_text(counts['nf4_bytes'])}  (zeros included; embeddings and lm_head in bf16)"),
        ("masks", f"{size_text(counts['mask_bytes'])}  ({counts['mask_bits']:.3g} bit per weight, on top)"),
        (
            "without the zeros",
            f"{packed} in bf16, {in_nf4} in NF4, masks included  (computed; releases store the zeros)",
        ),
    ]


def _runs(kept: Sequence[Mapping[str, int]]) -> list[tuple[int, int, tuple[int, int]]]:
    """Merge neighbouring layers of equal sizes: (first, last, (kv_heads, channels))."""
    runs: list[tuple[int, int, tuple[int, int]]] = []
    for entry in kept:
        sizes = (entry["kv_heads"], entry["channels"])
        if runs and runs[-1][2] == sizes:
            runs[-1] = (runs[-1][0], entry["layer"], sizes)
        else:
            runs.append((entry["layer"], entry["layer"], sizes))
    return runs


def print_info(described: Mapping[str, Any]) -> None:
    """Print what `info` found."""
    pruning, base = described["pruning"], described["base"]
    quantization = described["quantization"]
    print_table(
        None,
        [
            ("release", described["id"]),
            ("base model", f"{base['id']} @ {base['commit'] or 'local folder'}"),
            ("pruning", _pruning_text(pruning)),
            ("aligned", "yes" if described["alignment"] else "no"),
            ("weights", f"{quantization['type']}, rest {quantization['dtype']}" if quantization else "not quantized"),
            ("files", size_text(described["file_bytes"])),
        ],
    )
    print_counts(described)


def _pruning_text(pruning: Mapping[str, Any]) -> str:
    if "pattern" in pruning:
        return f"{pruning['method']}, {pruning['pattern']}, sparsity {pruning['sparsity']:g}"
    return f"{pruning['method']}, {pruning['importance']}, ratio {pruning['pruning_ratio']}"


def print_table(header: Sequence[str] | None, rows: Sequence[Sequence[str]], *, err: bool = False) -> None:
    """Print rows in columns, on stdout or stderr."""
    lines = [list(header)] if header else []
    lines += [list(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), err=err)


def print_release(folder: Path, as_json: bool) -> None:
    """Print a release that was just written."""
    from loram_hub import info

    described = info(folder)
    print_result(described | {"folder": str(folder)}, as_json, lambda: print_info(described))
    if not as_json:
        suggest("loram verify", folder)
