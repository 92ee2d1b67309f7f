"""The tokenizer's chat template: what it writes around messages, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loram_hub.errors import InvalidRequestError
from loram_hub.instructions.examples import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ERRORS_WITHIN = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What expressions of a template raise, which Jinja passes on as it is."""
_PROBE = ("first-question", "first-answer", "second-question")


class RefusedConversation(Exception):
    """The chat template does not take a conversation, or changes the turns before an answer because of it."""

    def __init__(self, detail: str, *, is_changed: bool = False) -> None:
        super().__init__(detail)
        self.is_changed = is_changed


def check_template(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Raise `InvalidRequestError` if the tokenizer has no chat template; `place` is where one is needed."""
    if tokenizer.chat_template is None:
        raise InvalidRequestError(
            f"{place} is a conversation, and the tokenizer {tokenizer.name_or_path!r} has no chat template, as base "
            "models often have none. Set the source's style to plain (headings in plain words, no control tokens), or "
            "give the tokenizer the template (tokenizer.chat_template) that the adapter will be served with."
        )


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, generation: bool = False) -> str:
    """Return a conversation as the template writes it.

    Args:
        tokenizer: with a chat template.
        messages: the conversation.
        generation: open an answer behind it.

    Raises:
        RefusedConversation: the template refuses it, or fails over it.
        InvalidRequestError: the template is no valid one.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    except TemplateSyntaxError as err:
        raise InvalidRequestError(
            f"The chat template of the tokenizer {tokenizer.name_or_path!r} is no valid Jinja template: {err.message} "
            f"(line {err.lineno}). Mend it, or set the source's style to plain."
        ) from err
    except TemplateError as err:
        raise RefusedConversation(str(err)) from err
    except _ERRORS_WITHIN as err:
        raise RefusedConversation(f"it fails with {type(err).__name__}: {err}") from err


def render_answered(tokenizer: PreTrainedTokenizerBase, prompt: Messages, answer: Messages) -> tuple[str, str]:
    """Return a prompt, an answer opened behind it, and the same prompt with its answer, as the template writes them.

    Some templates open an answer with more than they leave in a conversation (an empty block of thoughts); training
    then starts where the two differ. A template that writes the turns before the answer otherwise once there is an
    answer would have the model trained on questions: that is refused.

    Raises:
        RefusedConversation: the template refuses the conversation, or changes the turns before the answer.
    """
    opened, whole = render(tokenizer, prompt, generation=True), render(tokenizer, prompt + answer)
    if not whole.startswith(opened) and not whole.startswith(closed := render(tokenizer, prompt)):
        same = common_prefix(whole, closed)
        raise RefusedConversation(
            f"{closed[same : same + 40]!r} becomes {whole[same : same + 40]!r} once an answer follows", is_changed=True
        )
    return opened, whole


def text_of_its_own(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the template writes in front of every conversation besides marks of turns: a system message, say."""
    turns: Any = zip(("user", "assistant", "user"), _PROBE, strict=True)
    try:
        text = render(tokenizer, [{"role": role, "content": content} for role, content in turns])
    except RefusedConversation:
        return ""
    opening, _, rest = text.removeprefix(str(tokenizer.bos_token or "")).partition(_PROBE[0])
    between = rest.partition(_PROBE[1])[2].partition(_PROBE[2])[0]
    shared = common_prefix(opening[::-1], between[::-1])  # the marks of a question
    return opening[: len(opening) - shared].strip()


def reads_the_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes today's date, so that the same data give other tokens tomorrow."""
    return "strftime_now" in str(tokenizer.chat_template)


def common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    """Return how many items two sequences have in common at their start."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((idx for idx, (a, b) in pairs if a != b), min(len(left), len(right)))
