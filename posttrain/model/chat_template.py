"""Chat templates as Hugging Face writes them: Jinja, in a sandbox, with the few extras templates expect.

A template comes with a model and is code from outside: it renders in jinja2's ImmutableSandboxedEnvironment, which lets
it reach neither attributes that begin with an underscore nor anything that changes its arguments.
"""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]
Span = tuple[int, int]

_PARTS = "; not every template takes content in parts: give it as text"


def render(template: str, messages: Sequence[Message], add_generation_prompt: bool = False, **variables: Any) -> str:
    """`template` applied to `messages`, each {"role": ..., "content": ...}. ValueError if the template refuses them."""
    return render_with_spans(template, messages, add_generation_prompt=add_generation_prompt, **variables)[0]


def render_with_spans(template: str, messages: Sequence[Message], **variables: Any) -> tuple[str, list[Span]]:
    """The text, and the character spans of it that {% generation %} blocks produced (what the assistant wrote)."""
    # As transformers: a key of null is a missing one (templates ask `is defined`, and would write None).
    messages = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages]
    parts = [m["content"] for m in messages if isinstance(m, dict) and isinstance(m.get("content"), list)]
    # A fresh random mark for every call: no message can contain it, so only the template can have put it there.
    mark = secrets.token_hex(16)
    try:
        marked = _compile(template).render(messages=messages, generation_mark=mark, **variables)
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"the chat template cannot render these {len(messages)} messages "
            f"(roles {[_role(message) for message in messages][:8]}): {error}" + (_PARTS if parts else "")
        ) from error
    if any(str(content) in marked for content in parts if content):
        raise ValueError(f"the chat template writes a list of content parts as Python would{_PARTS}")
    if "tool_calls" not in template and any(isinstance(m, dict) and m.get("tool_calls") for m in messages):
        raise ValueError("the chat template does not write tool_calls; use a model whose template does, or messages without")
    pieces = marked.split(mark)
    spans, position = [], 0
    for i, piece in enumerate(pieces):
        if i % 2:
            spans.append((position, position + len(piece)))
        position += len(piece)
    return "".join(pieces), spans


def has_generation_blocks(template: str) -> bool:
    """Whether the template marks what the assistant wrote."""
    attributes = _environment().parse(template).find_all(nodes.ExtensionAttribute)
    return any(attribute.identifier == _Generation.identifier for attribute in attributes)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: renders its body between two marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = nodes.Name("generation_mark", "load", lineno=line)
        return nodes.CallBlock(self.call_method("_surround", [mark]), [], [], body, lineno=line)

    def _surround(self, mark: str, caller: Any) -> str:
        return mark + caller() + mark


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else type(message).__name__


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not Jinja's own filter: that one escapes <, > and & for HTML, and a model should see the characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)
