"""Sources in, data sets for TRL out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loram_hub.errors import InvalidRequestError
from loram_hub.instructions.collecting import BadRecords, Collected, Collector, Policy, TooLong
from loram_hub.instructions.encoding import Encoder
from loram_hub.instructions.findings import merged_drops, warnings_of
from loram_hub.instructions.opening import open_source
from loram_hub.instructions.reports import DataReport
from loram_hub.instructions.sampling import hold_out
from loram_hub.instructions.sets import HELD_OUT, TRAIN, ExampleSet, sets_of
from loram_hub.instructions.sources import DataSource
from loram_hub.instructions.templates import reads_the_clock, text_of_its_own
from loram_hub.instructions.tokenizers import tokenizer_digest

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]  # ships no types
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Instructions:
    """Data to fine-tune on, in the columns that TRL's SFTTrainer takes.

    Pass `train` and `evaluations` to `SFTTrainer` as they are, with the same `max_length` in its config. It tokenizes
    them itself; set `completion_only_loss=True`, which it would otherwise decide by the first training example for the
    evaluation sets as well.
    """

    train: Dataset
    """Columns `prompt` and `completion` (texts, or lists of messages), `messages`, or `text`; in the order of the
    sources, which the trainer shuffles."""
    evaluations: Mapping[str, Dataset]
    """What is evaluated on by name: `held_out` first, if anything is, then the named sources."""
    report: DataReport
    """What was found."""


def read_instructions(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    evaluations: Sequence[DataSource] = (),
    held_out: float = 0,
    vocab_size: int | None = None,
    seed: int = 0,
    too_long: TooLong | None = None,
    bad_records: BadRecords = "error",
    token: str | bool | None = None,
) -> Instructions:
    """Read fine-tuning data, and find out before the training what is wrong with them.

    Every example is tokenized as TRL will do it. What cannot be learned is left out and counted: empty completions,
    conversations without an answer, what the chat template refuses, and what is too long. TRL would cut an example that
    is too long without a word, and so teach answers that end in mid-sentence; the default drops it.

    Args:
        sources: what to train on, one after another.
        tokenizer: the release's; see `check_tokenizer`. Conversations need its chat template.
        max_length: longest sequence, tokens, as the trainer will be told.
        evaluations: what to evaluate on besides, in the domain of the training or out of it, each under its name.
        held_out: examples of `sources` to keep out of the training, for evaluation: below 1 a share of the different
            questions, otherwise a number of examples. Chosen by content, so that no question is on both sides.
        vocab_size: rows of the model's embedding; None: token ids are not checked.
        seed: of samples (`DataSource.limit`) and of what is held out.
        too_long: `drop`, `truncate` (keeps the start, as TRL does; what has no token left to learn is dropped), or
            `error`; None: texts are truncated, everything else is dropped.
        bad_records: what becomes of records that are not laid out as their format says: null, NaN or a number for a
            text, a missing column. `drop` leaves them out and counts them.
        token: for private and gated datasets; None: the one that is logged in.

    Returns:
        The data sets and a report.

    Raises:
        InvalidRequestError: a source is not there or malformed, nothing is left of one, two evaluation sets have the
            same name, or an argument is outside its domain.
        IncompatibleError: the tokenizer gives ids that the model does not have, or its template doubles the
            begin-of-sequence token.
        VerificationError: a file is damaged.
        AccessError: a dataset cannot be had from the Hub.
        MissingDependencyError: `datasets` is not installed.
        ResourceError: the disk is full.

    Example:
        >>> from loram_hub.instructions import DataSource, read_instructions  # doctest: +SKIP
        >>> data = read_instructions(
        ...     [DataSource(source="tasks.jsonl")], tokenizer, max_length=512, held_out=100
        ... )  # doctest: +SKIP
        >>> SFTTrainer(model, args, train_dataset=data.train, eval_dataset=dict(data.evaluations))  # doctest: +SKIP
    """
    _check_request(sources, evaluations, max_length)
    encoder = Encoder(tokenizer, vocab_size=vocab_size)
    policy = Policy(max_length=max_length, too_long=too_long, bad_records=bad_records, seed=seed)
    opened = [open_source(source, token=token) for source in (*sources, *evaluations)]
    training = Collector(TRAIN, encoder, policy).collect(opened[: len(sources)])
    out = hold_out(training.keys, amount=held_out, seed=seed)
    evaluated = {
        source.label: Collector(source.label, encoder, policy).collect([one])
        for source, one in zip(evaluations, opened[len(sources) :], strict=True)
    }
    sets = tuple(sets_of(training, out, evaluated))
    report = _report(sets, [training, *evaluated.values()], tokenizer, policy)
    for line in report.lines():
        logger.info("%s", line)
    return Instructions(train=sets[0].dataset, evaluations={one.name: one.dataset for one in sets[1:]}, report=report)


def _check_request(sources: Sequence[DataSource], evaluations: Sequence[DataSource], max_length: int) -> None:
    if not sources:
        raise InvalidRequestError("No data source was given, so there is nothing to train on. Name at least one.")
    if max_length < 2:
        raise InvalidRequestError(f"max_length is {max_length}; 2 tokens are the least that can be learned from.")
    names = [TRAIN, HELD_OUT, *(source.label for source in evaluations)]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise InvalidRequestError(
            f"Two sets would be called {doubled[0]!r}: {TRAIN} and {HELD_OUT} are those of the training. Give each "
            "evaluation source a name of its own."
        )


def _report(
    sets: Sequence[ExampleSet], collected: Sequence[Collected], tokenizer: PreTrainedTokenizerBase, policy: Policy
) -> DataReport:
    told = tuple(one.report(max_length=policy.max_length, training=sets[0]) for one in sets)
    uses_template = any(one.kind in ("chat", "whole-chat") for one in collected)
    template_text = text_of_its_own(tokenizer) if uses_template else ""
    warnings = warnings_of(
        told,
        collected,
        template_text=template_text,
        reads_the_clock=uses_template and reads_the_clock(tokenizer),
    )
    return DataReport(
        sets=told,
        records=tuple(record for one in collected for record in one.records),
        dropped=merged_drops(collected),
        max_length=policy.max_length,
        seed=policy.seed,
        tokenizer_sha256=tokenizer_digest(tokenizer),
        template_text=template_text,
        warnings=tuple(warnings),
    )
