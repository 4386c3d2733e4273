"""Fill HTML templates: the skeleton, the style sheet and the security policy of every page.

    render(Path("view.html"), title="...", found=found)     # view.html extends page.html

A page is one file: it loads nothing and works offline. Captions, paths, URLs and error messages come from
strangers, so jinja escapes each value that a template inserts, and `visible` shows characters that would hide
or turn around what is beside them. `Markup` is the exception: the files beside this module, and what `render`
returned before (charts).
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from configs.text import KEPT, visible

HERE = Path(__file__).parent


def render(template: Path, **values: object) -> Markup:
    """Return the HTML of a template file. It may extend or include any template of this folder.

    Raises:
        jinja2.UndefinedError: the template uses a name that `values` lacks.
    """
    return _trusted(_environment(template.parent).get_template(template.name).render(values))


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["formatted"] = format  # {{ 0.5|formatted(".0%") }}
    style, script = ((HERE / name).read_text("utf-8") for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The browser refuses every other script, and every request, whatever a template let through.
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    environment.globals.update(policy=policy, style=_trusted(style), script=_trusted(script))
    return environment


def _shown(value: object) -> object:
    """Return what a template inserts: text from outside with escapes, all else as it is."""
    is_ours = isinstance(value, Markup | int | float)
    return value if is_ours else visible(value, keep=KEPT)


def _trusted(html: str) -> Markup:
    return Markup(html)  # noqa: S704 - our own files, and templates with every value escaped
