"""Self-contained HTML pages: a template of templates/ filled in, pictures and drawings inside it.

Everything that comes from outside, as names of classes and files, is escaped by jinja2.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from dist_train.figures import FAINT, HAIR, INK, MUTED, OTHER, PAPER, RIGHT, WRONG
from dist_train.files import write_file

THEME = {INK: "ink", MUTED: "muted", FAINT: "muted", HAIR: "hair", PAPER: "paper", RIGHT: "right", WRONG: "wrong"}
THEME |= {OTHER: "other"}
LARGEST = 192


def write_page(file: Path, template: str, **values: Any) -> None:
    """Write the page of a template, whole or not at all."""
    loader = PackageLoader("dist_train")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    environment.filters["percent"] = _percent
    text = environment.get_template(template).render(values)
    content = text.encode("utf-8", "backslashreplace")  # a file's name may be any bytes
    write_file(file, lambda aside: aside.write_bytes(content))


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}\N{NARROW NO-BREAK SPACE}%"


def embed_picture(image: np.ndarray) -> str:
    """Return a data: address of an image, uint8 [H, W], [H, W, 3], [1, H, W] or [3, H, W], at most LARGEST pixels."""
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image.transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(image.squeeze()))
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def embed_figure(figure: Figure, title: str) -> Markup:
    """Return a figure as <svg> in the colours of the page's theme, which `title` describes to those who cannot see."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    for colour, name in THEME.items():
        drawing = drawing.replace(colour, f"var(--{name})")
    box = f'viewBox="0 0 {72 * figure.get_figwidth():g} {72 * figure.get_figheight():g}"'
    inside = drawing[drawing.index(">", drawing.index("<svg")) + 1 :]
    return Markup(f'<svg {box} role="img" aria-label="{Markup.escape(title)}">{inside}')
