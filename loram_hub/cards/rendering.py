"""Templates: Jinja, with an environment in which forgetting to escape is safe."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from loram_hub.cards.escaping import Markdown, code
from loram_hub.errors import CheckpointError, MissingDependencyError

_PACKAGED = "model_cards"
_REPOSITORY = Path(__file__).resolve().parents[2] / "model_cards"
"""Where the templates are in a clone, which an editable install imports from."""


def render_card(template: str, metadata: ModelCardData, values: Mapping[str, object]) -> str:
    """Fill a template and put the metadata on top.

    Args:
        template: file name in `model_cards/`.
        metadata: of huggingface_hub.
        values: what the template shows. `Markdown` and whole numbers are shown as they are, anything else as code.

    Returns:
        The text of README.md.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as err:
        raise MissingDependencyError("Model cards need jinja2: pip install jinja2") from err
    environment = Environment(
        loader=FunctionLoader(read_template),
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # it escapes HTML, and the output is Markdown: `_shown` does it
    )
    body = environment.get_template(template).render(values)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body.strip()}\n"))


def read_template(name: str) -> str:
    """Read a template, from the installed package or from a clone.

    Raises:
        CheckpointError: the installation lacks it.
    """
    for folder in (resources.files("loram_hub") / _PACKAGED, _REPOSITORY):
        file = folder / name
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise CheckpointError(f"This installation of loram-hub lacks the template {name}. Install it again.")


def _shown(value: object) -> object:
    return value if isinstance(value, Markdown) or type(value) is int else code(value)
