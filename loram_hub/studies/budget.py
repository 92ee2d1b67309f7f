"""What a study was given, and where that differs from the paper, in sentences made from its settings."""

from __future__ import annotations

from collections.abc import Iterator

from loram_hub.studies.aggregation import Results
from loram_hub.studies.labels import METHOD_NAMES, count_text, plural
from loram_hub.studies.markdown import markdown_text
from loram_hub.studies.paper import ALIGNMENT_STEPS, BATCH, FINE_TUNING_STEPS, SEQUENCE
from loram_hub.studies.specification import Method, Study


def budget_lines(study: Study, results: Results) -> Iterator[str]:
    """Yield what each cell was given: model, pruning, alignment, fine-tuning, held-out sets, seeds."""
    yield f"Base: {_base(study)}{_parameters(results)}, {study.dtype} on {study.device}."
    methods = "; ".join(_method(method) for method in study.methods)
    yield (
        f"Pruning: {methods}. Structured pruning leaves the first {plural(study.keep_first, 'layer')} and the last "
        f"{study.keep_last} whole."
    )
    yield _alignment(study)
    tuning, lora = study.training, study.lora
    long = f"{tuning.steps} steps" if tuning.steps else f"{tuning.epochs or 'the default number of'} epochs"
    yield (
        f"Fine-tuning: LoRA with r {lora.r}, alpha {lora.alpha}, dropout {lora.dropout:g} on "
        f"{', '.join(lora.targets)}; {long} of {plural(tuning.batch_size, 'example')} of at most "
        f"{tuning.max_tokens} tokens, learning rate {tuning.learning_rate:g}; data: "
        f"{', '.join(markdown_text(data.name) for data in study.data)}."
    )
    tokens = {held_out: row.tokens for (_, _, held_out, _), row in results.rows.items()}
    sets = (f"{markdown_text(name)}, {plural(tokens[name], 'scored token')}" for name in results.held_out)
    yield f"Held-out sets: {'; '.join(sets)}."
    count = len(results.planned)
    there = count - len(results.missing(results.settings()))
    yield (
        f"Seeds: {', '.join(map(str, study.seeds))}; {there} of {plural(count, 'cell')} are there. A seed decides the "
        "choice at random, the calibration rows, the order of texts and examples, and the adapter's start."
    )


def difference_lines(study: Study) -> Iterator[str]:
    """Yield what is not as in the paper."""
    yield f"The paper prunes LLaMA models of 7 to 70 billion parameters; the base here is {_base(study)}."
    alignment, tuning = study.alignment, study.training
    paper_tokens = ALIGNMENT_STEPS * BATCH * SEQUENCE
    most = max(alignment.steps)
    tokens = most * alignment.settings.batch_size * alignment.settings.sequence_length
    if most:
        yield (
            f"Alignment takes at most {tokens:,} tokens in {plural(most, 'step')}; the paper's, {paper_tokens:,} in "
            f"{ALIGNMENT_STEPS:,}."
        )
    else:
        yield f"Nothing is aligned; the paper aligns on up to {paper_tokens:,} tokens."
    if tuning.steps:
        yield (
            f"Fine-tuning takes {plural(tuning.steps, 'step')} of {tuning.batch_size} examples; the paper's, "
            f"{FINE_TUNING_STEPS} of {BATCH}."
        )
    yield (
        "What is compared is the held-out loss in nats per token, which small models show; the paper's main tables "
        "compare accuracy on downstream tasks."
    )
    yield (
        f"There are {plural(len(study.seeds), 'seed')}, and the control of LoRA on only those layers of the base that "
        "pruning leaves whole, which the paper does not have. It needs the whole base in memory, so it is no rival "
        "where memory is what counts; it says how much of the gain few layers bring."
    )


def _base(study: Study) -> str:
    return "SmolLM2-135M-Instruct" if study.base == "demo" else f"`{study.base.rstrip('/').rpartition('/')[2]}`"


def _parameters(results: Results) -> str:
    for setting in results.settings("base", "plain"):
        for count in results.measures(setting, "parameters").values():
            return f" ({count_text(count)} parameters)"
    return ""


def _method(method: Method) -> str:
    name = METHOD_NAMES[method.method]
    if method.method == "semi":
        return f"{name} {method.pattern}"
    how = f" ({method.importance} importance)" if method.method == "stru" else ""
    return f"{name}{how} {', '.join(f'{ratio:g}' for ratio in method.ratios)}"


def _alignment(study: Study) -> str:
    settings, steps = study.alignment.settings, sorted(study.alignment.steps)
    if not any(steps):
        return "Alignment: none."
    return (
        f"Alignment: {', '.join(map(str, steps))} steps of {settings.batch_size} sequences of "
        f"{settings.sequence_length} tokens, learning rate {settings.learning_rate:g}, training {settings.trainable}."
    )
