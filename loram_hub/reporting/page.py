"""From contents and pictures to one HTML file that needs nothing else: style and pictures are inside of it.

Every text is escaped by the template engine: names in a report are a stranger's, and none of them is markup. The page
also forbids itself, by its Content-Security-Policy, to load or run anything.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, resources

from loram_hub.errors import CheckpointError, MissingDependencyError
from loram_hub.reporting.contents import Contents

_TEMPLATE, _STYLE = "report.html.j2", "report.css"
_SIZE = struct.Struct(">II")
_SHOWN = re.compile(r'<img src="data:image/png;base64,([A-Za-z0-9+/]+={0,2})" data-name="([\w-]+)"')
_SIZE_AT = 16
"""Where a PNG has its width and height."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Embedded:
    """A picture as the page holds it."""

    uri: str
    width: int
    """Pixels, told before the picture is decoded so that the page does not jump."""
    height: int


def render_page(contents: Contents, pictures: Mapping[str, bytes]) -> str:
    """Write the page.

    Args:
        contents: what it shows.
        pictures: PNG files by the names of the figures.

    Returns:
        HTML, a function of the arguments and of the version of this package.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as err:
        raise MissingDependencyError("Reports need jinja2: pip install jinja2") from err
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_packaged(_TEMPLATE))
    return template.render(
        contents=contents,
        pictures={name: _embedded(png) for name, png in pictures.items()},
        style=Markup(_packaged(_STYLE).strip()),
        version=metadata.version("loram-hub"),
    )


def pictures_of(html: str) -> dict[str, bytes]:
    """Return the pictures that a page of ours shows, by name; none of a page that is not ours."""
    return {name: base64.b64decode(content) for content, name in _SHOWN.findall(html)}


def _embedded(png: bytes) -> _Embedded:
    width, height = _SIZE.unpack_from(png, _SIZE_AT)
    return _Embedded(uri=f"data:image/png;base64,{base64.b64encode(png).decode()}", width=width, height=height)


def _packaged(name: str) -> str:
    file = resources.files("loram_hub.reporting") / name
    if not file.is_file():
        raise CheckpointError(f"This installation of loram-hub lacks {name}. Install it again.")
    return file.read_text(encoding="utf-8")
