"""What should be looked at before hours are spent on training, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loram_hub.instructions.collecting import Collected, Notes
from loram_hub.instructions.examples import Reason
from loram_hub.instructions.reports import Dropped, SetReport

_ADVICE: Mapping[Reason, str] = {
    "empty completion": "There is nothing to learn from them.",
    "no answer to a question": "Only what an assistant says to a user or tool is learned.",
    "refused by the chat template": "If it is about system messages, set the source's system to merge.",
    "changed by the chat template": "Set the source's style to plain, or use another template.",
    "longer than max_length": "Raise max_length, or set too_long to truncate, which teaches answers without their end.",
    "prompt fills max_length": "Nothing of the answer would be left. Raise max_length.",
    "nothing to learn": "Not one token follows what is given. Does the chat template write the answer?",
    "malformed": "They are not laid out as their format says.",
}


def warnings_of(
    sets: Sequence[SetReport], collected: Sequence[Collected], *, template_text: str, reads_the_clock: bool
) -> Iterator[str]:
    """Yield warnings: about what was left out, what overlaps, and what tokens look wrong.

    Args:
        sets: the training set first.
        collected: what they were made of.
        template_text: what the chat template in use writes by itself.
        reads_the_clock: whether the chat template in use writes today's date.
    """
    for drop in merged_drops(collected):
        detail = f"; the first: {drop.detail}" if drop.detail else ""
        yield (
            f"{drop.count:,} × {drop.reason}, left out (from {', '.join(drop.places)}{detail}). {_ADVICE[drop.reason]}"
        )
    yield from _about_sets(sets)
    for one in collected:
        yield from _about_tokens(one.notes, len(one.lengths), is_chat=one.kind in ("chat", "whole-chat"))
    if template_text:
        yield (
            f"The chat template opens every conversation with a text of its own: {template_text!r:.300}. It is trained "
            "on, and a server that uses the same template writes it, too."
        )
    if reads_the_clock:
        yield "The chat template writes today's date, so the same data give other tokens on another day."


def merged_drops(collected: Sequence[Collected]) -> tuple[Dropped, ...]:
    """Return what was left out of several sets, by reason."""
    found: dict[Reason, Dropped] = {}
    for drop in (drop for one in collected for drop in one.dropped):
        first = found.get(drop.reason)
        found[drop.reason] = drop if first is None else first.joined(drop)
    return tuple(found[reason] for reason in sorted(found))


def _about_sets(sets: Sequence[SetReport]) -> Iterator[str]:
    for one in sets:
        if one.shared_with_training:
            yield (
                f"{one.shared_with_training:,} of {one.examples:,} examples of {one.name} have a question that is "
                "trained on: its loss will look better than it is. Take them out of one of the two."
            )
        if one.truncated:
            yield f"{one.truncated:,} of {one.examples:,} examples of {one.name} are cut at max_length."
        if one.kind == "whole-chat":
            yield f"{one.name} holds whole conversations: questions are learned like answers."


def _about_tokens(notes: Notes, examples: int, *, is_chat: bool) -> Iterator[str]:
    if notes.split and is_chat:
        yield (
            f"In {notes.split:,} of {examples:,} examples the chat template opens an answer with other tokens than it "
            "leaves in a conversation (a block of thoughts, often); the loss starts where they differ."
        )
    elif notes.split:
        yield (
            f"In {notes.split:,} of {examples:,} examples the end of the prompt becomes other tokens once the "
            "completion follows; the loss starts where they differ. A server gives the model the prompt alone. End "
            "prompts where a token ends: without a final space, the completion starting with one."
        )
    if notes.had_bos:
        yield (
            f"{notes.had_bos:,} of {examples:,} examples spelled out the begin-of-sequence token that the tokenizer "
            "adds itself; it was taken off, or it would stand twice."
        )
    if notes.has_control:
        yield (
            f"{notes.has_control:,} of {examples:,} examples spell out control tokens in their texts; the model reads "
            "them as such, not as text."
        )
    if is_chat and notes.without_end:
        yield (
            f"In {notes.without_end:,} of {examples:,} examples the chat template ends the answer without a control "
            "token, so the model does not learn where to stop. Use the template of the family's instruct model."
        )
