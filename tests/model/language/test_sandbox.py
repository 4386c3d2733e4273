"""Somebody else's template: what it may write, and that it ends.

compile_template(text, "chat_template.jinja").render({"messages": [...]})
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from jinja2 import TemplateError

from configs import UserError
from model.language.sandbox import LONGEST_TEMPLATE, compile_template


def render(text: str, **values: Any) -> str:
    return compile_template(text, "chat_template.jinja").render(values)


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        (
            "{% for m in messages %}{{ m['role'].upper() + ': ' + m.content }};{% endfor %}",
            "USER: a;ASSISTANT: b;",
        ),
        (
            "{% for m in messages %}{{ loop.last }}{{ loop.length }}{{ loop.index0 }}{% endfor %}",
            "False20True21",
        ),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
            "assistant",
        ),
        (
            "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ m.content }}{% endfor %}",
            "a",
        ),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{{ messages | map(attribute='role') | join('/') }}", "user/assistant"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "a"}'),
        ("{{ '<é>' | tojson }}{{ {'b': 1}['b'] }}", '"<é>"1'),
        (
            "{% set a = namespace(n=0) %}{% for m in messages %}{% set a.n = a.n + 1 %}{% endfor %}{{ a.n }}",
            "2",
        ),
        (
            "{{ ' a b '.strip().split(' ')[-1] }}{{ 'x' * 3 }}{{ 'aXa' | replace('X', '-') }}",
            "bxxxa-a",
        ),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) ~ f(2) }}", "[1][2]"),
        ("{{ tools is none }}{{ absent is defined }}{{ absent }}", "TrueFalse"),
        ("{% if true %}\n  a\n{% endif %}\n", "  a\n"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        (
            "{% for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}",
            "123",
        ),
    ],
)
def test_what_chat_templates_use(text: str, result: str) -> None:
    assert render(text, messages=MESSAGES, tools=None) == result


DOUBLING = (
    "{% set ns = namespace(x='aaaaaaaaa') %}{% for i in range(90) %}{% set ns.x = STEP %}{% endfor %}"
    "{{ ns.x }}"
)


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% for i in [[1]] * 90 recursive %}{{ loop([[1]] * 90) }}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{{ 1000000000 * 'a' }}",
        "{{ ([0] * 1000000000) | length }}",
        "{{ 9 ** 9 ** 9 }}",
        DOUBLING.replace("STEP", "ns.x + ns.x"),
        DOUBLING.replace("STEP", "ns.x ~ ns.x"),
        DOUBLING.replace("STEP", "ns.x | replace('a', ns.x)"),
        DOUBLING.replace("STEP", "ns.x.replace('a', ns.x)"),
        DOUBLING.replace("STEP", "[ns.x, ns.x] | join(ns.x)"),
        "{{ 'a'.center(1000000000) }}{{ 'a'.ljust(1000000000) }}",
        "{{ 'a'.zfill(1000000000) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'a\nb' | indent(1000000000) | length > 2000 or 1 / 0 }}",
        "{{ raise_exception('no system turn') }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ messages.pop() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ render.__globals__ }}{{ raise_exception.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% include 'other' %}",
    ],
)
def test_what_it_may_not_do_ends_within_seconds(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateError):
        render(text, messages=MESSAGES)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "text", ["{% if %}", "{{ x | nofilter }}", "{{ 'x' | center(9) }}", "{% for %}"]
)
def test_a_text_that_is_no_template_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^a\.jinja: not a chat template \(Jinja\): ") as caught:
        compile_template(text, "a.jinja")
    assert "\n" not in str(caught.value)


def test_a_template_is_not_read_at_any_length() -> None:
    with pytest.raises(UserError, match="1,048,577 characters; at most 1,048,576"):
        compile_template("x" * (LONGEST_TEMPLATE + 1), "a.jinja")


def test_each_rendering_has_all_steps() -> None:
    template = compile_template("{% for i in range(90000) %}{% endfor %}x", "a.jinja")
    assert {template.render({}) for _ in range(30)} == {"x"}
