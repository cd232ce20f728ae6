"""The sections of recipes, each a dataclass: read from YAML with `key=value` overrides, and shown to editors.

A field of a recipe's dataclass holds a plain value, or

- a section: another dataclass, or None;
- a section with fields of a class that is built later: see `fields_of`;
- one of a few words: see `one_of`.

Where a recipe has a text or a list in place of a section, `short_for` of the dataclass names the field that it stands
for. `spelled_out` of a dataclass expands other short forms.
"""

from __future__ import annotations

import difflib
import enum
import inspect
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hf_erasure.adapters.common.config import field_types, is_a, short, type_text
from hf_erasure.adapters.common.files import parse_yaml, read_text

Section = TypeVar("Section")
_MOST_LISTED = 20  # a message lists so many fields at most
_KIND, _ABOVE, _WORDS = "fields of", "known at the top", "words"
_JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def fields_of(kind: type, *above: str) -> dict[str, Any]:
    """Metadata of a field whose keys are the fields of a dataclass, except some that are at the top of the recipe."""
    return {_KIND: kind, _ABOVE: above}


def one_of(words: Sequence[str]) -> dict[str, Any]:
    """Metadata of a field that holds one of some words."""
    return {_WORDS: tuple(words)}


def read(path: str | Path, overrides: Iterable[str] = (), *, kind: type[Section]) -> Section:
    """Read a recipe of a kind and apply `key=value` overrides; dots reach into sections, as in `fit.batch_size=16`.

    Raises:
        ValueError: If the file is not a recipe, a key is unknown or missing, or the run cannot use a value.
    """
    content = read_content(path, overrides, ", ".join(_required(kind)))
    return section_of(content, kind, missing_in=str(path))


def read_content(path: str | Path, overrides: Iterable[str], expected: str) -> dict[str, Any]:
    """The keys and values of a YAML file with `key=value` overrides, whose values are YAML too.

    `expected` names keys of such a recipe, for the message. Raises `ValueError` if the file is not a recipe, or an
    override cannot be applied.
    """
    content = parse_yaml(read_text(Path(path)), f"{path} is")
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a recipe: expected keys such as {expected}.")
    return overridden(content, overrides)


def overridden(content: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `key=value` overrides in place. Raises `ValueError` if one cannot be applied."""
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ValueError(f"{override!r} is not key=value, as in model=bert-base-uncased.")
        section = content
        *parents, last = key.split(".")
        for parent in parents:
            if section.get(parent) is None:  # a key without a value stands for an empty section
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise ValueError(f"{key!r}: {parent!r} is a value, not a section of the recipe.")
        section[last] = parse_yaml(value, f"{override!r} has a value that is")
    return content


def section_of(content: Any, kind: type[Section], section: str = "", *, missing_in: str = "") -> Section:
    """Make the dataclass of a section of a recipe; without a name, of the whole recipe, whose file is `missing_in`.

    Raises `ValueError` if a key is not known, a key is missing, or a value has another type.
    """
    field = getattr(kind, "short_for", None)
    if field is not None and not isinstance(content, dict):
        if not isinstance(content, (str, list)):
            keys = ", ".join(entry.name for entry in fields(kind))  # type: ignore[arg-type]
            raise ValueError(f"{section}={short(content)} in a recipe must be texts, or a section with {keys}.")
        content = {field: content}
    spelled_out = getattr(kind, "spelled_out", None)
    if spelled_out is not None and isinstance(content, dict):
        content = spelled_out(content)
    content = check_section(content, kind, section)
    for name in _required(kind):
        if content.get(name) is None:
            raise ValueError(f"{missing_in or section} lacks {name}: {documented(kind)[name]}")
    entries = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    declared = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{section}.{key}" if section else key
        hint, owner = declared[key], entries[key].metadata.get(_KIND)
        section_class: Any = next((inner for inner in typing.get_args(hint) or (hint,) if is_dataclass(inner)), None)
        if (section_class or owner) and value is None:
            continue
        if section_class is not None:
            values[key] = section_of(value, section_class, name)
        elif owner is not None:
            nested = check_section(value, owner, name, entries[key].metadata[_ABOVE])
            values[key] = {
                inner: _checked(nested[inner], field_types(owner)[inner], f"{name}.{inner}") for inner in nested
            }
        else:
            values[key] = _checked(value, hint, name, entries[key].metadata.get(_WORDS))
    return kind(**values)


def check_section(content: Any, kind: type, section: str = "", above: Sequence[str] = ()) -> dict[str, Any]:
    """Check that the keys of a section are fields of a dataclass, except those `above`, which are at the top.

    Raises `ValueError` if it is not a section, or a key is not known or belongs at the top; names the known keys.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{section} of a recipe is a section with keys of its own, not {short(content)}.")
    known = [entry.name for entry in fields(kind) if entry.init]
    for key in content:
        if key in above:
            raise ValueError(f"{section}.{key} is not known in a recipe: write {key} at the top alone.")
        if key not in known:
            name = f"{section}.{key}" if section else key
            named = difflib.get_close_matches(str(key), known, 3) or known[:_MOST_LISTED]
            there = ", ".join(named) + (", …" if len(named) < len(known) else "")
            raise ValueError(f"{name} is not known in a recipe; {section or 'it'} has {there}.")
    return dict(content)


def check_counts(section: Any, name: str, *counts: str) -> None:
    """Raise a `ValueError` where one of the counts of a section is below 1; None stands for no limit."""
    for count in counts:
        value = getattr(section, count)
        if value is not None and value < 1:
            raise ValueError(f"{name}.{count}={value} in a recipe must be 1 or more.")


def _checked(value: Any, hint: Any, name: str, words: Sequence[str] | None = None) -> Any:
    """Check the type of a value, and that it is one of some words; return it."""
    if not is_a(value, hint):
        wanted = type_text(hint)
        remedy = (
            " Write a text that YAML reads as another value, such as 1e5 or no, in quotes." if "str" in wanted else ""
        )
        raise ValueError(f"{name}={short(value)} in a recipe must be {wanted}.{remedy}")
    if words is not None and value is not None and value not in words:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, words))}.")
    return value


def documented(kind: type) -> dict[str, str]:
    """Field → its description in the `Args` or `Attributes` of a dataclass's docstring."""
    section = re.search(
        r"^(?:Args|Attributes):\n(?P<entries>(?:[ ]{4}.*\n?|\n)+)", inspect.getdoc(kind) or "", re.MULTILINE
    )
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section["entries"], re.MULTILINE) if section else ()
    return {name: " ".join(words.split()) for name, words in entries}


def _required(kind: Any) -> list[str]:
    return [e.name for e in fields(kind) if e.init and e.default is MISSING and e.default_factory is MISSING]


def json_schema(kind: type) -> dict[str, Any]:
    """What an editor needs to complete and check a recipe: the JSON schema of its dataclass."""
    title = f"A recipe of hf-erasure: {kind.__name__}"
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": title} | _object_schema(kind)


def _object_schema(kind: Any, leave_out: Sequence[str] = (), required: bool = True) -> dict[str, Any]:
    helps = {entry.name: entry.metadata["help"] for entry in fields(kind) if "help" in entry.metadata}
    words = helps | documented(kind)
    # The fields that PEFT and transformers add differ between their releases: they are allowed, but not listed.
    own_classes = [part for part in kind.__mro__ if part.__module__.startswith("hf_erasure.")]
    listed = {name for part in own_classes for name in inspect.get_annotations(part)}
    entries = [entry for entry in fields(kind) if entry.init and entry.name in listed and entry.name not in leave_out]
    found: dict[str, Any] = {
        "type": "object",
        "properties": {},
        "additionalProperties": any(entry.name not in listed for entry in fields(kind)),
    }
    for entry in entries:
        owner, choices = entry.metadata.get(_KIND), entry.metadata.get(_WORDS)
        if owner is not None:
            value = _object_schema(owner, entry.metadata[_ABOVE], required=False)
        elif choices is not None:
            value = {"enum": [*choices, *([None] if entry.default is None else [])]}
        else:
            value = _type_schema(field_types(kind)[entry.name])
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if isinstance(default, (str, bool, int, float, list)) and not isinstance(default, enum.Enum):
            value = value | {"default": default}
        description = {"description": words[entry.name]} if entry.name in words else {}
        found["properties"][entry.name] = description | value
    if required and (needed := _required(kind)):
        found["required"] = needed
    field = getattr(kind, "short_for", None)
    return {"anyOf": [*_alternatives(_type_schema(field_types(kind)[field])), found]} if field is not None else found


def _type_schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a declared type; for a type that JSON does not have, it allows every value."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        alternatives = [alternative for part in parts for alternative in _alternatives(_type_schema(part))]
        return {} if {} in alternatives else {"anyOf": alternatives}
    if origin is list or hint is list:
        return {"type": "array"} | ({"items": _type_schema(parts[0])} if parts else {})
    if origin is dict or hint is dict:
        return {"type": "object"} | ({"additionalProperties": _type_schema(parts[1])} if parts else {})
    if is_dataclass(hint):
        return _object_schema(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    return {"type": _JSON_TYPES[hint]} if hint in _JSON_TYPES else {}


def _alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return schema["anyOf"] if set(schema) == {"anyOf"} else [schema]
