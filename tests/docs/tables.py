"""python -m tests.docs.tables

The tables of the documentation whose contents come from the code: fields, options, metrics. A page has a place for
each, `<!-- table: NAME -->` to `<!-- end -->`. This command writes the tables, and a test fails if one differs from
the code.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from typer.main import get_command

from hf_erasure import ConceptErasureConfig, GradiendConfig, GradiendTrainingArguments
from hf_erasure.cli import app
from hf_erasure.evaluation.data import LAYOUT
from hf_erasure.metrics import METRICS, Facts
from hf_erasure.recipes.erasure import DataRecipe, Recipe
from hf_erasure.recipes.gradiend_recipe import GradiendRecipe, PairsRecipe, SelectRecipe
from hf_erasure.recipes.schema import documented

DOCS = Path(__file__).resolve().parents[2] / "docs"
PLACE = re.compile(r"(<!-- table: (?P<name>\w+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)


def rendered(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(head), ["---"] * len(list(head)), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _default(entry: dataclasses.Field[Any]) -> str:
    if entry.default is not dataclasses.MISSING:
        return f"`{entry.default!r}`"
    if entry.default_factory is not dataclasses.MISSING:
        made = entry.default_factory()
        return f"`{made!r}`" if not dataclasses.is_dataclass(made) and len(repr(made)) < 20 else ""
    return "required"


def fields_of(owner: type, *, but: type | None = None) -> str:
    """A table of the documented fields of a dataclass; fields of the base class `but` need no documentation.

    Raises:
        ValueError: If a field of its own is not documented, or a documented one does not exist.
    """
    own = {entry.name: entry for entry in dataclasses.fields(owner)}
    foreign = {entry.name for entry in dataclasses.fields(but)} if but is not None else set()
    words = documented(owner)
    if unknown := [name for name in words if name not in own]:
        raise ValueError(f"{owner.__name__} documents {unknown}, which it has not.")
    if silent := [name for name in own if name not in words and name not in foreign]:
        raise ValueError(f"{owner.__name__} does not document {silent}.")
    return rendered(("field", "default", "meaning"), ((f"`{n}`", _default(own[n]), words[n]) for n in words))


def arguments_of_training() -> str:
    """The fields that `GradiendTrainingArguments` adds, and those whose default it changes."""
    own = {entry.name: entry for entry in dataclasses.fields(GradiendTrainingArguments)}
    words = documented(GradiendTrainingArguments)
    changed = [n for n in inspect.get_annotations(GradiendTrainingArguments) if n not in words]
    said = {n: str(own[n].metadata.get("help", "")).replace("As in TrainingArguments.", "as there") for n in changed}
    rows = ((f"`{name}`", _default(own[name]), text) for name, text in (words | said).items())
    return rendered(("field", "default", "meaning"), rows)


def layout() -> str:
    """The folders and files that `hf-erasure evaluate` looks for."""
    return rendered(("folder", "files"), ((f"`{name}/`", what) for name, what in LAYOUT.items()))


def metrics() -> str:
    """Every metric with its own description, under a heading."""
    return "\n".join(_metric(name, metric.facts, inspect.getdoc(sys.modules[metric.__module__]) or "")
                     for name, metric in METRICS.items())  # fmt: skip


def _metric(name: str, facts: Facts, doc: str) -> str:
    low, high = (f"{bound:g}".replace("-", "−").replace("inf", "∞") for bound in facts.bounds)
    better = {"lower": "lower is better", "higher": "higher is better", "closer": f"best at {facts.ideal:g}"}
    lines = [
        f"**`{facts.figure}`** = {facts.formula}",
        f"Range: {low} to {high}; {better[facts.better]}.",
        f"Interval: {facts.interval}.",
        f"Name: `{name}`. Paper: [{facts.paper}]({facts.url}).",
    ]
    if facts.harness:
        lines.append(f"The same on causal models in lm-evaluation-harness: `{facts.harness}`.")
    return f"## {facts.title}\n\n{doc}\n\n" + "".join(f"- {line}\n" for line in lines)


def commands() -> str:
    """Every command with its arguments and options."""
    found: list[str] = []
    _describe(get_command(app), "hf-erasure", found)
    return "\n".join(found)


def _describe(command: Any, path: str, found: list[str]) -> None:
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            if not child.hidden:  # such as an older name of a command
                _describe(child, f"{path} {name}", found)
        return
    # Python 3.13 removes the indentation of docstrings, earlier versions keep it.
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(command.help or "").split("\n\n")]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    shown = " ".join(_shown(argument) for argument in arguments)
    found.append(f"## {path}\n\n`{path} {shown}".rstrip() + "`\n")
    found += [_example(part) + "\n" for part in paragraphs]
    rows = [(f"`{_shown(a)}`", "required" if a.required else "", a.help or "") for a in arguments]
    rows += [(f"`{', '.join([*o.opts, *o.secondary_opts])}`", _shown_default(o), o.help or "") for o in options]
    found.append(rendered(("argument", "default", "meaning"), rows))


def _shown(argument: Any) -> str:
    named = argument.metavar or argument.name.upper()
    return str(named if argument.required or named.startswith("[") else f"[{named}]")


def _shown_default(option: Any) -> str:
    empty = option.default is None or option.default == "" or type(option.default).__name__ == "UNSET"
    return "required" if option.required else "" if empty else f"`{option.default}`"


def _example(paragraph: str) -> str:
    match = re.fullmatch(r"Example: (.*)", paragraph)
    return f"```bash\n{match[1]}\n```" if match else paragraph


TABLES: dict[str, Callable[[], str]] = {
    "ConceptErasureConfig": lambda: fields_of(ConceptErasureConfig, but=_peft()),
    "GradiendConfig": lambda: fields_of(GradiendConfig, but=_peft()),
    "GradiendTrainingArguments": arguments_of_training,
    "Recipe": lambda: fields_of(Recipe),
    "DataRecipe": lambda: fields_of(DataRecipe),
    "GradiendRecipe": lambda: fields_of(GradiendRecipe),
    "SelectRecipe": lambda: fields_of(SelectRecipe),
    "PairsRecipe": lambda: fields_of(PairsRecipe),
    "LAYOUT": layout,
    "METRICS": metrics,
    "COMMANDS": commands,
}


def _peft() -> type:
    from peft import PeftConfig

    return PeftConfig


def filled(text: str) -> str:
    """The text of a page with its tables as the code has them."""
    return PLACE.sub(lambda place: f"{place[1]}{TABLES[place['name']]()}{place[4]}", text)


def pages() -> list[Path]:
    """The pages that have a place for a table."""
    return [page for page in sorted(DOCS.rglob("*.md")) if PLACE.search(page.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    for page in pages():
        before = page.read_text(encoding="utf-8")
        if (after := filled(before)) != before:
            page.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{page.relative_to(DOCS)}\n")
