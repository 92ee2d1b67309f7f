"""The tables of README.md from the lines of JSON that the benchmarks printed, so that nobody types figures.

    python benchmarks/gpu/table.py results.jsonl              # to the terminal
    python benchmarks/gpu/table.py results.jsonl --write      # into README.md, between its marks
    python benchmarks/gpu/table.py --write                    # without results: every cell says so

GB are powers of ten. Of several lines about the same thing the last one counts; lines of tiny models never do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from qloram_step import FOCUS, MICRO_BATCHES, OPTIONS, configurations  # noqa: E402 (below the path)
from unpruned import DEPTHS  # noqa: E402

README = HERE / "README.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
MISSING = "not measured"
Results = Mapping[tuple[Any, ...], Mapping[str, Any]]
PEAK_GB, LEAST_GB = 20.0, 14.0
"""Targets: reserved at micro-batch 4, plain and with memory options; 10^9 bytes."""
STEP_SHARE, LOAD_SHARE = 1 / 3, 1.0
"""Targets: a step in parts of the unpruned one, loading in parts of stock transformers' time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="files that run_all.py wrote")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    arguments = parser.parse_args()
    text = render(read_lines(arguments.results))
    if not arguments.write:
        print(text)
        return
    README.write_text(with_tables(README.read_text(encoding="utf-8"), text), encoding="utf-8")


def with_tables(document: str, text: str) -> str:
    """Return a document with everything between its marks replaced."""
    before, _, rest = document.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{README} lacks the marks {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def read_lines(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Read the lines of JSON among what is in the files, without those of tiny models."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [each for each in found if not each["quick"]]


def render(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return all tables as Markdown."""
    steps = _steps(lines)
    singles = {line["benchmark"]: line["figures"] for line in lines}
    parts = [
        _where(lines),
        "**Targets**: a GB is 10^9 bytes here. `loram estimate --gpu 20GB` means a GPU of 20 * 2^30, 21.47 of these.",
        _table(("target", "found", "met"), targets(steps, singles.get("load"))),
        "**A QLoRAM training step**: 512 tokens, rank 8, gradient checkpointing, paged 8-bit AdamW.",
        _table(
            (
                "shape", "ratio", "memory options", "micro-batch", "allocated, GB", "reserved, GB", "device in use, GB",
                "allocated, predicted", "predicted / found", "ms per step", "tokens/s",
            ),
            _step_rows(steps),
        ),
        "**The same step, unpruned**: lines through the depths that were measured, at the whole model.",
        _table(
            (
                "shape", "micro-batch", "ms per layer", "ms per step by the line", "ms per step measured",
                "allocated by the line, GB", "allocated measured, GB",
            ),
            _unpruned_rows(steps),
        ),
        "**What pruning saves**: unpruned / pruned, each with a QLoRA step of the same shape.",
        _table(("shape", "ratio", "micro-batch", "memory", "time of a step", "throughput"), _saving_rows(steps)),
        "**Streamed Taylor**: 10 samples of 128 tokens, whole layers.",
        _table(("shape", "seconds per layer", "allocated, GB"), _taylor_rows(singles.get("taylor_block"))),
        "**Loading** onto the GPU, files in the page cache, a process for each load.",
        _table(("shape", "ratio", "release", "stock, same bytes", "release / stock"), _load_rows(singles.get("load"))),
    ]  # fmt: skip
    return "\n\n".join(parts)


def _where(lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return "No GPU could be had yet: nothing below is measured."
    devices = sorted({line["figures"]["device"]["name"] for line in lines if "name" in line["figures"]["device"]})
    days = sorted({line["date"] for line in lines})
    versions = ", ".join(f"{name} {version}" for name, version in lines[-1]["versions"].items())
    return f"Measured on {' and '.join(devices) or 'CPU'}, {days[0]} to {days[-1]}; {versions}."


def _steps(lines: Iterable[Mapping[str, Any]]) -> Results:
    """Figures by (shape, ratio, options, layers, micro-batch)."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for line in lines:
        if line["benchmark"] in ("qloram_step", "unpruned"):
            figures = line["figures"]
            key = (figures["shape"], figures["ratio"], figures["options"], figures["layers"])
            for micro_batch, measured in figures["micro_batches"].items():
                found[*key, int(micro_batch)] = measured
    return found


def _depth(shape: str) -> int:
    return DEPTHS[shape][-1]


def _pruned(steps: Results, shape: str, ratio: float, options: str, micro_batch: int) -> Mapping[str, Any]:
    return steps.get((shape, ratio, options, _depth(shape), micro_batch), {})


def _line(steps: Results, shape: str, micro_batch: int, key: str) -> tuple[float, float] | None:
    """Slope per layer and value at the whole model, of a figure of the unpruned step; None below two depths."""
    points = [
        (layers, found[key])
        for layers in DEPTHS[shape]
        if key in (found := steps.get((shape, 0.0, "plain", layers, micro_batch), {}))
    ]
    if len(points) < 2:
        return None
    slope, intercept = linear_regression(*zip(*points, strict=True))
    return slope, intercept + slope * _depth(shape)


def _whole(steps: Results, shape: str, micro_batch: int, key: str) -> float | None:
    """A figure of the whole unpruned model: measured, or by the line where it does not fit."""
    measured = steps.get((shape, 0.0, "plain", _depth(shape), micro_batch), {}).get(key)
    if measured is not None:
        return float(measured)
    line = _line(steps, shape, micro_batch, key)
    return None if line is None else line[1]


def _step_rows(steps: Results) -> Iterator[Sequence[str]]:
    for shape, ratio, options in configurations():
        for micro_batch in MICRO_BATCHES:
            found = _pruned(steps, shape, ratio, options, micro_batch)
            if found.get("out_of_memory"):
                cells = ["out of memory"] * 7
            else:
                predicted, allocated = found.get("predicted", {}).get("allocated"), found.get("peak_allocated")
                cells = [
                    *(_cell(found.get(key), _gb) for key in ("peak_allocated", "peak_reserved", "device_used")),
                    _cell(predicted, _gb),
                    _cell(predicted / allocated if predicted and allocated else None, "{:.2f}".format),
                    _cell(found.get("ms_per_step"), "{:,.0f}".format),
                    _cell(found.get("tokens_per_second"), "{:,.0f}".format),
                ]
            yield [shape, f"{ratio:g}", options, str(micro_batch), *cells]


def _unpruned_rows(steps: Results) -> Iterator[Sequence[str]]:
    for shape in DEPTHS:
        for micro_batch in MICRO_BATCHES:
            whole = steps.get((shape, 0.0, "plain", _depth(shape), micro_batch), {})
            time = _line(steps, shape, micro_batch, "ms_per_step")
            memory = _line(steps, shape, micro_batch, "peak_allocated")
            yield [
                shape,
                str(micro_batch),
                _cell(time and time[0], "{:.1f}".format),
                _cell(time and time[1], "{:,.0f}".format),
                _measured_cell(whole, "ms_per_step", "{:,.0f}".format),
                _cell(memory and memory[1], _gb),
                _measured_cell(whole, "peak_allocated", _gb),
            ]


def _saving_rows(steps: Results) -> Iterator[Sequence[str]]:
    for shape, ratio, options in configurations():
        for micro_batch in MICRO_BATCHES if options == "plain" else ():
            found = _pruned(steps, shape, ratio, options, micro_batch)
            memory, time = (
                _quotient(_whole(steps, shape, micro_batch, key), found.get(key))
                for key in ("peak_allocated", "ms_per_step")
            )
            cells = [_cell(each, "{:.2f}".format) for each in (memory, time, time)]  # tokens per step are the same
            yield [shape, f"{ratio:g}", str(micro_batch), *cells]


def _taylor_rows(found: Mapping[str, Any] | None) -> Iterator[Sequence[str]]:
    peaks = [each for each in (found or {}).get("peak_allocated", {}).values() if each]
    seconds = (found or {}).get("seconds_per_layer")
    yield [FOCUS[0], _cell(seconds, "{:.2f}".format), _cell(max(peaks, default=None), _gb)]


def _load_rows(found: Mapping[str, Any] | None) -> Iterator[Sequence[str]]:
    seconds = (found or {}).get("seconds", {})
    share = _cell((found or {}).get("release_to_stock"), "{:.2f}".format)
    times = (_cell(seconds.get(kind), "{:.2f} s".format) for kind in ("release", "stock"))
    yield [FOCUS[0], f"{FOCUS[1]:g}", *times, share]


def targets(steps: Results, load: Mapping[str, Any] | None) -> Iterator[Sequence[str]]:
    """Rows of target, what was found, and whether it is met."""
    shape, ratio = FOCUS
    most = MICRO_BATCHES[-1]
    plain = _pruned(steps, shape, ratio, "plain", most)
    reserved = [_pruned(steps, shape, ratio, options, most).get("peak_reserved") for options in OPTIONS]
    least = min((each for each in reserved[1:] if each is not None), default=None)
    share = _quotient(plain.get("ms_per_step"), _whole(steps, shape, most, "ms_per_step"))
    name = f"{shape} at {ratio:g}, 512 tokens, micro-batch {most}"
    loading = (load or {}).get("release_to_stock")
    rows: Sequence[tuple[str, float | None, float, Callable[[float], str]]] = (
        (f"{name}: at most {PEAK_GB:g} GB reserved", reserved[0], PEAK_GB * 1e9, _gb_text),
        (f"the same with memory options: at most {LEAST_GB:g} GB", least, LEAST_GB * 1e9, _gb_text),
        ("its step: at most 1/3 of the unpruned one", share, STEP_SHARE, "{:.2f}".format),
        ("loading: at most the time of stock transformers", loading, LOAD_SHARE, "{:.2f}".format),
    )
    for target, found, limit, form in rows:
        yield [target, _cell(found, form), MISSING if found is None else "yes" if found <= limit else "**no**"]


def _quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}"


def _gb_text(nbytes: float) -> str:
    return f"{_gb(nbytes)} GB"


def _cell(value: float | None, form: Callable[[float], str]) -> str:
    return MISSING if value is None else form(value)


def _measured_cell(found: Mapping[str, Any], key: str, form: Callable[[float], str]) -> str:
    return "out of memory" if found.get("out_of_memory") else _cell(found.get(key), form)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
