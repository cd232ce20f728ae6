"""Make a card from facts: its Markdown by a template, its metadata for the Hub, and its picture.

The templates are in `model_cards/` of the repository; a wheel has them inside the package. Names of concepts, classes
and modules come from files of strangers, so every value that a template inserts is escaped.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_erasure.adapters.common.config import number_of
from hf_erasure.adapters.common.files import write_whole
from hf_erasure.fitting.report import AFTER, BEFORE, draw_leakage, figures
from hf_erasure.models.heads import HEAD_OF, Head

from .facts import EFFECT, LEAKAGE, LONGEST, CardFacts, is_number, plain

OURS = "hf-erasure"
# What stands in a card for the name of a repository that is not known yet.
FOLDER_PLACEHOLDER = "path/to/this/folder"
# How to install this package; cards take the text from here.
INSTALL = "`pip install .` in a clone of its repository, and `pip install hf-erasure` once it is on the index"
# Such tags of an earlier card may name another base, or a folder on somebody's disk.
REPLACED_TAGS = ("base_model:",)
_TAGS = {
    "concept_erasure": ["concept-erasure", "debiasing", "interpretability"],
    "gradiend": ["gradiend", "debiasing", "model-editing"],
}
_FOLDERS, _SUFFIX = [folder / "model_cards" for folder in Path(__file__).parents[1:3]], ".md.j2"
# The most characters that are shown of a text that is not a name, such as who labelled the data.
_LONGEST_TEXT = 2000
# Characters that have a meaning within a line of GitHub's Markdown; `<`, `>` and `&` become entities.
_MARKS = re.compile(r"([\\`*_\[\]|~$])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_BLOCK = re.compile(r"<!-- hf-erasure ([0-9a-f]{12}): [^\n]*? -->\n(.*?)\n<!-- hf-erasure end -->", re.DOTALL)
_NOTE = "made by hf-erasure; what you write before or after this part stays"


@dataclass(frozen=True)
class Card:
    """A card that could stand alone, in its two parts: its metadata, and its Markdown."""

    data: ModelCardData
    text: str

    @property
    def block(self) -> str:
        """The Markdown between the marks by which it is found again."""
        digest = hashlib.sha256(self.text.encode("utf-8")).hexdigest()[:12]
        return f"<!-- hf-erasure {digest}: {_NOTE} -->\n{self.text}\n<!-- hf-erasure end -->"

    @classmethod
    def read(cls, readme: str) -> Card | None:
        """The card in a README.md; None if there is none, or somebody has changed it."""
        found = unchanged_block(readme.replace("\r\n", "\n"))
        return None if found is None else cls(ModelCard(readme).data, found[2])  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"---\n{self.data.to_yaml()}\n---\n\n{self.block}\n"


def unchanged_block(text: str) -> re.Match[str] | None:
    """The part of a README.md that is ours, if nobody has changed it."""
    found = _BLOCK.search(text)
    is_ours = found is not None and hashlib.sha256(found[2].encode("utf-8")).hexdigest().startswith(found[1])
    return found if is_ours else None


def rendered(facts: CardFacts) -> Card:
    """Make the card of an adapter from its facts."""
    head, where = HEAD_OF.get(facts.base_class), facts.base_id or facts.base_class
    what = "Erasure of" if facts.kind == "concept_erasure" else "GRADIEND of"
    title = plain(f"{what} “{facts.concept}”" + (f" in {where}" if where else ""))
    method = facts.method.get("name")
    tags = [*_TAGS[facts.kind], *([method] if method in ("leace", "inlp") else [])]
    card = fill_template(facts, facts.kind, title, head, tags)
    data, text = card.data, card.text + (f"\n\n{facts.training.strip()}" if facts.training else "")
    theirs = [tag for tag in facts.tags if not tag.startswith(REPLACED_TAGS)]
    data.tags = list(dict.fromkeys([*(data.tags or ()), *theirs]))
    # Each measure of the base and of the adapter, in the form that the Hub lists.
    results = [
        EvalResult(
            task_type=data.pipeline_tag or "other",
            dataset_type=OURS,
            dataset_name=row["data"] + (", other measures" if row["is_other"] else ""),
            metric_type=row["key"],
            metric_name=f"{row['title']} ({who})",
            metric_value=round(float(row[when]), 6),
            metric_args={"measured_by": OURS, "model": who},
        )
        for row in facts.measured
        for when, who in (("before", "base"), ("after", "with the adapter"))
        if row[when] is not None
    ]
    if results:
        data.model_name, data.eval_results = title, results
    return Card(data, text)


def fill_template(
    facts: CardFacts,
    template: str,
    title: str,
    head: Head | None,
    tags: Iterable[str],
    library: str = "peft",
    **more: Any,
) -> Card:
    """A filled template, without empty lines in a row, and its metadata without results, for a `library`."""
    auto_class = "AutoModel" if head is None else head.auto_class
    filled = environment().get_template(f"{template}{_SUFFIX}")
    text = filled.render(facts=facts, title=title, auto_class=auto_class, **more)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.strip().splitlines()))
    is_adapter = library == "peft"
    of_base = [*adapter_tags(facts.base_id), *(["transformers"] if head else [])] if is_adapter else []
    data = ModelCardData(
        library_name=library, base_model=facts.base_id, pipeline_tag=None if head is None else head.pipeline_tag,
        tags=[OURS, *tags, *of_base], datasets=facts.datasets or None, license=facts.license,
        language=facts.language or None,
    )  # fmt: skip
    if facts.base_id is not None:
        data["base_model_relation"] = "adapter" if is_adapter else "finetune"
    return Card(data, text)


def adapter_tags(base: str | list[str] | None) -> list[str]:
    """The tags by which the Hub lists the adapters of a base model, or of several."""
    return [f"base_model:adapter:{name}" for name in ([base] if isinstance(base, str) else base or [])]


@functools.cache
def environment() -> Environment:
    """The environment of the templates: every value that they insert is escaped, unless it is `Markdown` already."""
    made = Environment(
        loader=FileSystemLoader(_FOLDERS),
        finalize=functools.partial(escaped, longest=_LONGEST_TEXT),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals |= {"somewhere": FOLDER_PLACEHOLDER, "install": Markdown(INSTALL)}
    made.filters |= {
        "code": code,
        "number_of": number_of,
        "number": number,
        "listed": lambda names: Markdown(", ".join(map(code, names))),
        # A string as Python writes it, for a block of code.
        "literal": lambda value: Markdown(json.dumps(plain(value), ensure_ascii=False)),
        # A file or a name on the Hub, as the target of a link.
        "path": lambda value: Markdown(quote(plain(value), safe="/")),
    }
    return made


class Markdown(str):
    """Text that is Markdown already, and goes into a card unchanged."""

    __slots__ = ()


def escaped(value: Any, longest: int = LONGEST) -> Markdown:
    """Escape text, so that it is shown unchanged within a line, in a table too."""
    if isinstance(value, Markdown):
        return value
    marked = _MARKS.sub(r"\\\1", plain(value, longest))
    return Markdown("".join(_ENTITIES.get(c, c) for c in marked))


def code(value: Any) -> Markdown:
    """A name as code; as plain text where it has characters that end code or a cell of a table."""
    text = plain(value)
    return Markdown(f"`{text}`") if text and not re.search(r"[`|\\<>]", text) else escaped(text)


def number(value: Any, form: str = "", interval: Any = None) -> Markdown:
    """A number in a form, or with digits by its size, and its interval; a dash if the value is not a number."""
    if not is_number(value):
        return Markdown("–")
    usual = "," if isinstance(value, int) else ",.1f" if abs(value) >= 100 else ".3f"
    ends = "" if interval is None else f" [{number(interval[0])}, {number(interval[1])}]"
    return Markdown(f"{value:{form or usual}}{ends}")


def draw(facts: CardFacts, folder: Path) -> str | None:
    """Draw what was measured into the folder, if matplotlib is there and the picture is not.

    Returns the name of the picture; None if there is nothing to draw.
    """
    is_erasure = facts.kind == "concept_erasure"
    lines = [site for site in [*facts.sites, *facts.finals] if site["before"] is not None]
    shares = [row for row in facts.measured if row["before"] is not None and not row["is_other"]]
    bars = [row for row in shares if 0 <= row["before"] <= 1 and 0 <= row["after"] <= 1]
    name = LEAKAGE if is_erasure else EFFECT
    if not (lines if is_erasure else bars):
        return None
    if (folder / name).is_file() or find_spec("matplotlib") is None:
        return name
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a name is not a formula
        figure = figures.Figure(figsize=(8, 4 if is_erasure else 0.5 * len(bars) + 1.2), layout="constrained")
        axes = figure.subplots()
        if is_erasure:
            draw_leakage(axes, lines, f"on {facts.method['figures_on']}")
            axes.set_xticks(range(len(lines)), [line["name"] for line in lines], rotation=90, fontsize=6)
        else:
            for offset, when, color in ((-0.2, "before", BEFORE), (0.2, "after", AFTER)):
                places = [i + offset for i in range(len(bars))]
                axes.barh(places, [row[when] for row in bars], 0.38, color=color, label=when)
            axes.set_yticks(range(len(bars)), [row["title"] for row in bars], fontsize=7)
            axes.invert_yaxis()
            axes.legend()
        write_whole(folder / name, lambda path: figure.savefig(path, format="png", dpi=110))
    return name
