"""Run a chat template of somebody else: Jinja in a sandbox, with a limit on its work and on its text.

    template = compile_template(text)           # UserError unless it is one
    template.render({"messages": [...]})        # TemplateError: it raised, or it does not end

The environment has what transformers gives to chat templates: `raise_exception`, `strftime_now`, `tojson`
without HTML escapes, `{% generation %}`, `{% break %}` and `{% continue %}`. Code in a template reaches
nothing but what it is given.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from configs import UserError, one_line

LONGEST_TEMPLATE = 1 << 20
"""Characters of the longest template. The longest seen has 20 thousand."""
MOST_STEPS = 2_000_000
"""Steps of one rendering, such as items of loops: a second or two."""
LONGEST_TEXT = 1 << 24
"""Characters of the longest text that a template may make."""
CALL_STEPS = 10
"""Steps that a call counts for, which takes ten times as long as an item of a loop."""
WIDENING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
"""Methods of texts whose result may be of any length."""
FILTERS = ("center", "format", "filesizeformat", "pprint", "urlize", "wordwrap", "xmlattr")
"""Filters that are not there: their results may be of any length, or they write HTML."""

_steps: ContextVar[int] = ContextVar("steps", default=0)


class Template:
    """A compiled template."""

    def __init__(self, compiled: jinja2.Template) -> None:
        self._compiled = compiled

    def render(self, values: Mapping[str, Any]) -> str:
        """Return the text for some values, which are plain JSON values.

        Raises:
            TemplateError: the template raised, or its work or its text went beyond the limits.
        """
        _steps.set(0)
        try:
            pieces, length = [], 0
            for piece in self._compiled.generate(**values):
                length += len(piece)
                _check_length(length)
                pieces.append(piece)
        except TemplateError:
            raise
        except RecursionError:
            raise TemplateError("it calls itself without end") from None
        except Exception as error:  # whatever an operation of a stranger's template may raise
            raise TemplateError(f"{type(error).__name__}: {error}") from None
        return "".join(pieces)


def compile_template(text: str, where: str) -> Template:
    """Return a template of somebody else.

    Args:
        text: in Jinja's language.
        where: the file that it is from, for messages.

    Raises:
        UserError: it is none.
    """
    if len(text) > LONGEST_TEMPLATE:
        raise UserError(
            f"{where}: a chat template of {len(text):,} characters; at most {LONGEST_TEMPLATE:,} are read"
        )
    try:
        return Template(_environment().from_string(text))
    except (TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
        raise UserError(
            f"{where}: not a chat template (Jinja): {one_line(error) or type(error).__name__}"
        ) from None


def _check_length(length: int) -> None:
    if length > LONGEST_TEXT:
        raise TemplateError(f"its text has more than {LONGEST_TEXT:,} characters")


def _step(number: int = 1) -> None:
    done = _steps.get() + number
    if done > MOST_STEPS:
        raise TemplateError(f"it does not end within {MOST_STEPS:,} steps")
    _steps.set(done)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the items of a loop, each of which is a step."""
    for item in items:
        _step()
        yield item


def _bounded(value: Any) -> Any:
    """Return a value after a check of its length, if it has one."""
    if isinstance(value, str | bytes | list | tuple):
        _check_length(len(value))
    return value


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which loops and calls are counted and texts are measured."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            if not isinstance(loop.iter, nodes.Filter) or loop.iter.name != "counted":
                loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
        _wrap(tree, nodes.Concat, "bounded")
        _wrap(tree, nodes.Filter, "bounded")
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**"):
            sizes = [
                len(one) if isinstance(one, str | list | tuple) else 0 for one in (left, right)
            ]
            numbers = [abs(one) for one in (left, right) if isinstance(one, int | float)]
            if any(sizes) and numbers:
                _check_length(max(sizes) * int(min(numbers[0], LONGEST_TEXT + 1)))
            elif operator == "**" and any(number > 1 << 10 for number in numbers):
                raise TemplateError("a power of a number above 1,024")
        if operator == "%" and isinstance(left, str):
            raise TemplateError("% on a text")
        return _bounded(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is not None:
            raise TemplateError("format() of a text")
        return None

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        _step(CALL_STEPS)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            name = getattr(obj, "__name__", "")
            if name in WIDENING:
                raise TemplateError(f"{name}() of a text")
            if name == "replace":
                _check_replace(owner, *args, **kwargs)
        return _bounded(super().call(context, obj, *args, **kwargs))


def _wrap(tree: nodes.Template, kind: type[nodes.Expr], name: str) -> None:
    """Pass each expression of a kind through a filter, wherever it is a part of another node."""
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for field, value in parent.iter_fields():
            if isinstance(value, kind) and not _is_ours(value):
                setattr(parent, field, nodes.Filter(value, name, [], [], None, None))
            elif isinstance(value, list):
                value[:] = [
                    nodes.Filter(one, name, [], [], None, None)
                    if isinstance(one, kind) and not _is_ours(one)
                    else one
                    for one in value
                ]


def _is_ours(node: nodes.Node) -> bool:
    # A filter without an input is that of a {% filter %} block.
    return isinstance(node, nodes.Filter) and (
        node.name in ("counted", "bounded") or node.node is None
    )


def _check_replace(text: str, old: str = "", new: str = "", *_: Any) -> None:
    """Refuse a replacement whose result might be too long."""
    found = text.count(old) if isinstance(old, str) else 0
    if isinstance(new, str):
        _check_length(len(text) + found * len(new))


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    _check_replace(str(text), str(old), str(new))
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _join(items: Iterable[Any], d: Any = "", attribute: str | None = None) -> str:
    texts, length = [], 0
    for item in items:
        _step()
        texts.append(str(item if attribute is None else item[attribute]))
        length += len(texts[-1]) + len(str(d))
        _check_length(length)
    return str(d).join(texts)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    before = width if isinstance(width, str) else " " * min(int(width), 1000)
    _check_length(len(str(text)) + (str(text).count("\n") + 1) * len(before))
    lines = str(text).splitlines()
    return "\n".join(
        before + line if (number or first) and (line or blank) else line
        for number, line in enumerate(lines)
    )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int):
        indent = min(indent, 16)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: Any) -> None:
    raise TemplateError(str(message))


def _now(style: str) -> str:
    return _bounded(datetime.now().strftime(style))  # noqa: DTZ005 - as transformers does it


class _Namespace(Namespace):
    """Names without an underscore at the start, so that Python's own are out of reach."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a name in a namespace begins with an underscore: {name}")


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, around what the assistant says: its content alone."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_content")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    made = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    for name in FILTERS:
        del made.filters[name]
    made.filters |= {
        "counted": _counted,
        "bounded": _bounded,
        "tojson": _to_json,
        "replace": _replace,
        "join": _join,
        "indent": _indent,
    }
    made.globals = {
        "range": made.globals["range"],
        "dict": dict,
        "namespace": _Namespace,
        "raise_exception": _raise,
        "strftime_now": _now,
    }
    return made
