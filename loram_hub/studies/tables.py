"""Tables of a study as records; `markdown` and `latex` write them.

Each table carries the three controls: the base untouched, plain LoRA on the base, and LoRA on only those layers of the
base that structured pruning leaves whole. A number that was not measured is an entry that says so, never a zero, and
the note below a table counts the cells of the study that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from loram_hub.errors import InvalidRequestError
from loram_hub.studies.aggregation import ADAPTED, RECOVERED, Results, Setting
from loram_hub.studies.cells import NOTHING, Entry, Shown
from loram_hub.studies.labels import group_label, label, plural, set_name, slug

CONTROLS = ("base", "plain", "whole layers")
_MOST_NAMED = 6
"""Missing cells that a note names."""
_SPREADS = "Mean ± sample standard deviation over the seeds."
_PARAMETERS = "Parameters are those of the model that is trained on, without what a sparse release removed."
_SHARES = "The share of plain LoRA's gain is (base - recovered) / (base - plain LoRA), seed by seed."

PARTS = ("losses", "recovery", "ratios", "steps", "domains", "cost")
"""Names of tables, and of the figures that show the same."""

Columns = Mapping[str, Callable[[Shown], Entry]]
"""Heading and content of each column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One table."""

    name: str
    """Of letters, digits and dashes."""
    caption: str
    """What it shows, in one sentence."""
    columns: tuple[str, ...]
    """Headings; the first column is text, the others are numbers."""
    rows: tuple[tuple[Entry, ...], ...]
    """As many entries each as there are columns."""
    note: str
    """What has to be known to read it."""


def study_tables(results: Results, shows: Sequence[str] = ()) -> dict[str, tuple[Table, ...]]:
    """Return the tables that a study's rows can fill, by name; those of losses once for each held-out set.

    Args:
        results: from `gather`.
        shows: names to return, of `PARTS`; none for all.
    """
    of_a_set = {"losses": losses_table, "recovery": recovery_table, "ratios": ratios_table, "steps": steps_table}
    of_all = {"domains": domains_table, "cost": cost_table}
    tables: dict[str, tuple[Table, ...]] = {}
    for name in shown_parts(results, shows):
        if name in of_a_set:
            tables[name] = tuple(of_a_set[name](results, held_out) for held_out in results.held_out)
        else:
            tables[name] = (of_all[name](results),)
    return tables


def shown_parts(results: Results, shows: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of tables and figures that a study's rows can fill.

    Args:
        results: from `gather`.
        shows: names to choose from; none for all of `PARTS`.

    Raises:
        InvalidRequestError: a name is none of `PARTS`.
    """
    unknown = [name for name in shows if name not in PARTS]
    if unknown:
        raise InvalidRequestError(f"shows has {unknown[0]!r:.80}; tables and figures are {', '.join(PARTS)}.")
    loram = results.settings("loram")
    has = {
        "losses": True,
        "recovery": bool(aligned_pairs(results)),
        "ratios": len({setting.ratio for setting in loram} - {None}) > 1,
        "steps": len({setting.alignment_steps for setting in loram}) > 2,
        "domains": len(results.data) > 1,
        "cost": any(setting.kind != "base" for setting in results.settings()),
    }
    return tuple(name for name in PARTS if has[name] and (not shows or name in shows))


def losses_table(results: Results, held_out: str) -> Table:
    """Tabulate all models of every setting: before fine-tuning, with the adapter, the base with the recovered one."""
    used = results.settings()
    columns: Columns = {
        "setting": Shown.name,
        "seeds": Shown.seed_count,
        "parameters": Shown.parameters,
        "before fine-tuning": Shown.before,
        "with the adapter, not recovered": Shown.adapted,
        "base + recovered": Shown.final,
        "better than the base by": Shown.gain,
        "share of plain LoRA's gain": Shown.share,
    }
    return Table(
        name=f"losses-{slug(held_out)}",
        caption=f"Held-out loss on {set_name(results, held_out)}, in nats per token.",
        columns=tuple(columns),
        rows=_rows(results, used, columns, held_out),
        note=f"{_SPREADS} {_PARAMETERS} {_SHARES} {_counted(results, used, held_out)}",
    )


def recovery_table(results: Results, held_out: str) -> Table:
    """Tabulate every method and ratio with and without recovery, with and without alignment (the paper's figure 6)."""
    controls, pairs = results.settings(*CONTROLS), aligned_pairs(results)
    rows = [
        (shown.name(), shown.seed_count(), *(NOTHING,) * 3, shown.final(), NOTHING, NOTHING)
        for shown in (Shown(results, setting, held_out) for setting in controls)
    ]
    for pair in pairs:
        unaligned, aligned = (Shown(results, setting, held_out) for setting in pair)
        name = f"{group_label(results, pair[1])}, {pair[1].alignment_steps} alignment steps"
        recovered = aligned.losses(RECOVERED)
        rows.append(
            (
                Entry(value=name), aligned.seed_count(), unaligned.adapted(), aligned.adapted(),
                replace(unaligned.final(), bold=False), aligned.final(),
                aligned.difference(recovered, aligned.losses(ADAPTED)),
                aligned.difference(recovered, unaligned.losses(RECOVERED)),
            )
        )  # fmt: skip
    used = [*controls, *(setting for pair in pairs for setting in pair)]
    return Table(
        name=f"recovery-{slug(held_out)}",
        caption=f"With and without recovery and alignment: held-out loss on {set_name(results, held_out)}, in nats per "
        "token.",
        columns=(
            "setting", "seeds", "neither", "aligned, not recovered", "recovered, not aligned", "both",
            "recovery brings", "alignment brings",
        ),
        rows=tuple(rows),
        note=f"{_SPREADS} Not recovered is the pruned model with the adapter, recovered the base with it. The last two "
        "columns are paired by seed: recovery on the aligned release, and alignment where the adapter is recovered; "
        f"below zero it helps. {_counted(results, used, held_out)}",
    )  # fmt: skip


def ratios_table(results: Results, held_out: str) -> Table:
    """Tabulate loss, perplexity and reduction of parameters over the ratio (the paper's figures 7 and 8)."""
    used = [*results.settings(*CONTROLS), *(one for one in results.settings("loram") if one.ratio is not None)]
    columns: Columns = {
        "setting": Shown.name,
        "seeds": Shown.seed_count,
        "parameters": Shown.parameters,
        "times fewer": Shown.reduction,
        "loss, base + recovered": Shown.final,
        "its perplexity": Shown.perplexity,
        "share of plain LoRA's gain": Shown.share,
    }
    return Table(
        name=f"ratios-{slug(held_out)}",
        caption=f"Over the ratio: the base with the recovered adapter on {set_name(results, held_out)}, in nats per "
        "token.",
        columns=tuple(columns),
        rows=_rows(results, used, columns, held_out),
        note=f"{_SPREADS} {_PARAMETERS} Perplexity is exp(loss), seed by seed. {_SHARES} "
        f"{_counted(results, used, held_out)}",
    )


def steps_table(results: Results, held_out: str) -> Table:
    """Tabulate losses over the steps of alignment (the paper's figure 5)."""
    used = results.settings()
    columns: Columns = {
        "setting": Shown.name,
        "seeds": Shown.seed_count,
        "alignment tokens": Shown.alignment_tokens,
        "before fine-tuning": Shown.before,
        "with the adapter, not recovered": Shown.adapted,
        "base + recovered": Shown.final,
        "share of plain LoRA's gain": Shown.share,
    }
    return Table(
        name=f"steps-{slug(held_out)}",
        caption=f"Over the steps of alignment: held-out loss on {set_name(results, held_out)}, in nats per token.",
        columns=tuple(columns),
        rows=_rows(results, used, columns, held_out),
        note=f"{_SPREADS} {_SHARES} {_counted(results, used, held_out)}",
    )


def cost_table(results: Results) -> Table:
    """Tabulate what fine-tuning costs: parameters, memory and time (the paper's table 8)."""
    used = results.settings()
    columns: Columns = {
        "setting": Shown.name,
        "seeds": Shown.seed_count,
        "parameters": Shown.parameters,
        "times fewer": Shown.reduction,
        "peak memory (MB)": lambda shown: _cost(shown, "peak_memory_bytes", 1e-6, 0),
        "fine-tuning (s)": lambda shown: _cost(shown, "tuning_seconds", 1.0, 1),
        "making the release (s)": lambda shown: _cost(shown, "making_seconds", 1.0, 1) if shown.is_loram else NOTHING,
    }
    return Table(
        name="cost",
        caption="What fine-tuning costs: the model that is trained on, peak memory, time.",
        columns=tuple(columns),
        rows=_rows(results, used, columns, None),
        note=f"{_SPREADS} {_PARAMETERS} Memory (1 MB is 10^6 bytes) is the highest of the process while it fine-tuned, "
        "with what it still held of stages before; on a GPU, of the device. Times are wall-clock times, loading and "
        "saving included: noisy, as the machine may have had other work. "
        f"{_counted(results, used, None)}",
    )


def _cost(shown: Shown, measure: str, scale: float, digits: int) -> Entry:
    return NOTHING if shown.is_base else shown.measured(measure, scale=scale, digits=digits)  # type: ignore[arg-type]


def domains_table(results: Results) -> Table:
    """Tabulate every training set on every held-out set (the paper's table 7)."""
    used = results.settings()
    columns: dict[str, Callable[[Shown], Entry]] = {"setting": Shown.name, "seeds": Shown.seed_count}
    for held_out in results.held_out:
        columns[held_out] = partial(_final_on, held_out)
    columns["share of plain LoRA's gain in its own domain"] = _own_share
    return Table(
        name="domains",
        caption="Trained on one domain, measured on all: held-out loss of the base with the recovered adapter, in nats "
        "per token.",
        columns=tuple(columns),
        rows=_rows(results, used, columns, None),
        note=f"{_SPREADS} {_SHARES} {_counted(results, used, None)}",
    )


def _final_on(held_out: str, shown: Shown) -> Entry:
    return Shown(shown.results, shown.setting, held_out).final()


def _own_share(shown: Shown) -> Entry:
    own = [name for name, data in shown.results.in_domain.items() if data is not None and data == shown.setting.data]
    return Shown(shown.results, shown.setting, own[0]).share() if own else NOTHING


def aligned_pairs(results: Results) -> list[tuple[Setting, Setting]]:
    """Return the settings that the study has without alignment and with it: each with its longest alignment."""
    loram = results.settings("loram")
    pairs = []
    for unaligned in (one for one in loram if one.alignment_steps == 0):
        alike = [one for one in loram if replace(one, alignment_steps=0) == unaligned and one != unaligned]
        if alike:
            pairs.append((unaligned, alike[-1]))
    return pairs


def _rows(
    results: Results, used: Sequence[Setting], columns: Columns, held_out: str | None
) -> tuple[tuple[Entry, ...], ...]:
    shown = (Shown(results, setting, held_out) for setting in used)
    return tuple(tuple(entry(one) for entry in columns.values()) for one in shown)


def _counted(results: Results, used: Iterable[Setting], held_out: str | None) -> str:
    """Say how many of the cells of a table's settings are there, and which are not."""
    settings = set(used)
    wanted = sum(setting in settings for setting, _ in results.planned)
    missing = results.missing(settings, held_out)
    counted = f"{wanted - len(missing)} of {plural(wanted, 'cell')} (a setting with a seed)"
    if not missing:
        return f"{counted} are there."
    named = ", ".join(_missing_names(results, missing))
    return f"{counted} are there; missing: {named}."


def _missing_names(results: Results, missing: Sequence[tuple[Setting, int]]) -> Iterator[str]:
    for setting, seed in missing[:_MOST_NAMED]:
        yield f"{label(results, setting)} with seed {seed}"
    if len(missing) > _MOST_NAMED:
        yield f"{len(missing) - _MOST_NAMED} more"
