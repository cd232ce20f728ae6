"""Making the README.md of an adapter, and keeping what people have written into it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_erasure.adapters import ConceptErasureConfig, GradiendConfig
from hf_erasure.adapters.base_config import ChildConfig
from hf_erasure.fitting.files import write_text

from .facts import CardFacts, facts_of, head
from .generic import is_generic
from .markdown import plain
from .measured import read_json
from .metadata import filled, merged, metadata_of
from .plots import draw
from .templates import render

README, CONFIG = "README.md", "adapter_config.json"
_BLOCK = re.compile(r"<!-- hf-erasure ([0-9a-f]{12}): [^\n]*? -->\n(.*?)\n<!-- hf-erasure end -->", re.DOTALL)
_NOTE = "made by hf-erasure; what you write before or after this part stays"


@dataclass(frozen=True)
class Card:
    """A card that could stand alone, in its two parts.

    Attributes:
        data: Its metadata.
        text: Its Markdown.
    """

    data: ModelCardData
    text: str

    @property
    def block(self) -> str:
        """The Markdown between the marks by which it is found again."""
        return f"<!-- hf-erasure {_digest(self.text)}: {_NOTE} -->\n{self.text}\n<!-- hf-erasure end -->"

    @classmethod
    def read(cls, readme: str) -> Card | None:
        """The card in a README.md; None where there is none, or somebody has changed it."""
        found = _intact(readme.replace("\r\n", "\n"))
        return None if found is None else cls(ModelCard(readme).data, found[2])  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"---\n{self.data.to_yaml()}\n---\n\n{self.block}\n"


@dataclass(frozen=True)
class WrittenCard:
    """What became of a README.md.

    Attributes:
        path: The file.
        outcome: `"made"`, `"made anew"`, `"metadata"` where the text is somebody's own, or `"left"` where its metadata
            cannot be read.
        reason: Why it was left.
    """

    path: Path
    outcome: str
    reason: str = ""

    def __str__(self) -> str:
        return {
            "made": f"Wrote {self.path}.",
            "made anew": f"Wrote {self.path} anew.",
            "metadata": f"{self.path} has text of its own, which was kept; its metadata was brought up to date.",
            "left": f"{self.path} was left as it is: {self.reason}",
        }[self.outcome]


def rendered(facts: CardFacts) -> Card:
    """The card that says these facts."""
    title = title_of(facts)
    auto_class, _ = head(facts)
    text = render(facts.kind, facts=facts, title=title, auto_class=auto_class)
    if facts.training:
        text += f"\n\n{facts.training.strip()}"
    return Card(metadata_of(facts, title), text)


def title_of(facts: CardFacts) -> str:
    """The heading of the card."""
    what = "Erasure of" if facts.kind == "concept_erasure" else "GRADIEND of"
    where = facts.base_id or facts.base_class
    return plain(f"{what} “{facts.concept}”" + (f" in {where}" if where else ""))


def updated(present: str | None, card: Card, *, overwrite: bool = False) -> tuple[str, str, str]:
    """A README.md with the card in it.

    Args:
        present: The text of the file that is there.
        card: What it should say.
        overwrite: Take the place of text that somebody has written or changed.

    Returns:
        The new text, the outcome and its reason, as in `WrittenCard`.
    """
    if present is None or not present.strip():
        return str(card), "made", ""
    try:
        readme = ModelCard(present)
        data = merged(readme.data, card.data)
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        return present, "left", f"its metadata cannot be read ({plain(reason)}). Mend or delete it."
    text = readme.text.replace("\r\n", "\n")
    if is_generic(text) or overwrite:
        return str(Card(data, card.text)), "made anew" if overwrite else "made", ""
    found = _intact(text)
    if found is None:
        readme.data = data
        return str(readme), "metadata", ""
    kept = f"{text[: found.start()].lstrip()}{card.block}{text[found.end() :].rstrip()}"
    return f"---\n{data.to_yaml()}\n---\n\n{kept}\n", "made anew", ""


def write_card(
    folder: str | Path,
    config: ChildConfig | None = None,
    *,
    repo_id: str | None = None,
    subfolder: str | None = None,
    base_model: str | None = None,
    training: str = "",
    present: str | None = None,
    beside: str | Path | None = None,
    redraw: bool = False,
    overwrite: bool = False,
    tags: Iterable[str] = (),
    base_class: str | None = None,
) -> WrittenCard:
    """Make or update the card of an adapter's folder.

    Where a README.md is there that another library made of a template, or that is ours and unchanged, it is made anew,
    with its text outside our marks kept. Where somebody has written or changed it, only its metadata is updated.

    Args:
        folder: Where the adapter lies; its own folder, or one with adapters in folders of their names.
        config: Its configuration, where it is not yet in the folder.
        repo_id: Where the adapter will lie on the Hub.
        subfolder: The folder there, if it has one.
        base_model: The base's name on the Hub, in the place of what the configuration says.
        training: Markdown on the training run that ended with the adapter.
        present: The text to update, in the place of that of the folder's README.md.
        beside: A folder in which more adapters lie, in folders of their names.
        redraw: Draw the picture anew, though there is one.
        overwrite: Take the place of text that somebody has written or changed.
        tags: For the metadata, besides those that there are.
        base_class: The class of the base model, where the configuration does not say it.

    Returns:
        What was done.

    Raises:
        ValueError: If the folder holds no adapter of ours.
    """
    folder = Path(folder)
    facts = gather(folder, config, base_model=base_model, redraw=redraw)
    if facts.subfolder and beside is not None:
        more = {name: plain(other.described) for name, other in own_adapters(Path(beside)) if name != facts.subfolder}
        facts.others = more | facts.others
    facts.tags, facts.base_class = list(tags), facts.base_class or base_class
    facts.repo_id, facts.subfolder, facts.training = repo_id, subfolder or facts.subfolder, training
    path = folder / README
    try:
        present = text_of(path) if present is None else present
    except UnicodeDecodeError as error:
        return WrittenCard(path, "left", f"it is no text in UTF-8 ({error}). Mend or delete it.")
    text, outcome, reason = updated(present, rendered(facts), overwrite=overwrite)
    if outcome != "left":
        write_text(path, text)
    return WrittenCard(path, outcome, reason)


def gather(
    folder: Path, config: ChildConfig | None = None, *, base_model: str | None = None, redraw: bool = False
) -> CardFacts:
    """The facts of the adapter in a folder, and its picture, which is drawn where there is none.

    Raises:
        ValueError: If the folder holds no adapter of ours.
    """
    found = {"": config} if config is not None else dict(own_adapters(folder))
    if not found:
        raise ValueError(f"{folder} holds no adapter of hf_erasure: there is no {CONFIG} of one in it.")
    name, chosen = next(iter(found.items()))
    own = folder / name
    facts = facts_of(chosen, own, base_model=base_model)
    if redraw or not facts.pictures:
        drawn = draw(facts, own)
        if drawn is not None:
            facts = facts_of(chosen, own, base_model=base_model)
    if name:
        facts.subfolder = name
        facts.pictures = {f"{name}/{file}": text for file, text in facts.pictures.items()}
        facts.others = {other: plain(found[other].described) for other in found if other != name}
    return facts


def text_of(path: Path) -> str | None:
    """The text of a README.md; None where there is none."""
    return path.read_bytes().decode("utf-8-sig") if path.is_file() else None


def with_metadata_of(present: str, other: str | None) -> str:
    """A README.md with what the metadata of another one says besides; as it is where either cannot be read."""
    try:
        return filled(present, ModelCard(other).data) if other else present
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError):
        return present


def has_own_text(present: str | None) -> bool:
    """Whether somebody has written into a README.md, so that it must not be replaced by another."""
    if present is None:
        return False
    text = REGEX_YAML_BLOCK.sub("", present.replace("\r\n", "\n"), count=1)
    found = _intact(text)
    if found is not None:
        text = text[: found.start()] + text[found.end() :]
    return bool(text.strip()) and not is_generic(text)


def own_adapters(folder: Path) -> Iterator[tuple[str, ChildConfig]]:
    """Adapters of ours in a folder: its own, or else those in folders within it."""
    own = config_in(folder)
    if own is not None:
        yield "", own
        return
    if (folder / CONFIG).exists() or not folder.is_dir():
        return
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
        within = config_in(place)
        if within is not None:
            yield place.name, within


def config_in(folder: Path) -> ChildConfig | None:
    """The configuration of the adapter in a folder, where it is one of ours."""
    content = read_json(folder / CONFIG)
    kinds = {"CONCEPT_ERASURE": ConceptErasureConfig, "GRADIEND": GradiendConfig}
    kind = kinds.get(str(content.get("peft_type")))
    return None if kind is None else kind.from_pretrained(str(folder))


def _intact(text: str) -> re.Match[str] | None:
    """The part that is ours, where nobody has changed it."""
    found = _BLOCK.search(text)
    return found if found is not None and _digest(found[2]) == found[1] else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]
