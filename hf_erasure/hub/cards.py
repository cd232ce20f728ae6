"""The cards of adapters in a folder, of merged models and exported LoRAs, and of adapters that are being saved.

A card is put into a README.md, which may exist already. Text that somebody has written into it is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK, TEMPLATE_MODELCARD_PATH
from torch import nn
from transformers import PreTrainedModel

from hf_erasure.adapters import ConceptErasureConfig, GradiendConfig, LoraExport
from hf_erasure.adapters import export_to_lora as export
from hf_erasure.adapters.common.acting import warn_user
from hf_erasure.adapters.common.config import RECIPE, ChildConfig, adapter_config
from hf_erasure.adapters.common.files import CARD, CONFIG, root_of, target_of, write_text
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.models.heads import HEAD_OF
from hf_erasure.models.model import base_of

from .facts import DRAWN, OF_RECIPE, CardFacts, facts_of, hub_id, plain, read_object
from .rendering import OURS, REPLACED_TAGS, Card, adapter_tags, draw, fill_template, rendered, unchanged_block

# Each of these files makes a folder the folder of a model or of another adapter.
_MODEL_FILES = ("config.json", CONFIG)
# The errors of reading metadata that are not those of a card.
_METADATA_ERRORS = (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError)
# Lines that libraries write by themselves, in all their releases.
_LIBRARY_LINES = re.compile(
    r"""
    .*\[More\ Information\ Needed\]
    | This\ is\ the\ model\ card\ of\ a\ .*\ that\ has\ been\ pushed\ on\ the\ Hub\..*
    | Users\ \(both\ direct\ and\ downstream\)\ should\ be\ made\ aware\ of\ .*
    | Use\ the\ code\ below\ to\ get\ started\ with\ the\ model\.
    | Carbon\ emissions\ can\ be\ estimated\ using\ .*
    | \*\*(BibTeX|APA):\*\*
    | \#\ Model\ Card\ for\ Model\ ID
    | \#\#\#\ Framework\ versions
    | -\ (PEFT|Transformers|Pytorch|Datasets|Tokenizers)\ [\w.+]+
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class WrittenCard:
    """What was done with a README.md."""

    path: Path  # the file
    # `"made"`, `"made anew"`, `"metadata"` where the text is somebody's own, or `"left"` where metadata cannot be read
    outcome: str
    reason: str = ""  # why the file was left as it is

    def __str__(self) -> str:
        return {
            "made": f"Wrote {self.path}.",
            "made anew": f"Wrote {self.path} anew.",
            "metadata": f"{self.path} has text of its own, which was kept; its metadata was brought up to date.",
            "left": f"{self.path} was left as it is: {self.reason}",
        }[self.outcome]


def write_card(
    folder: str | Path,
    config: ChildConfig | None = None,
    *,
    repo_id: str | None = None,
    subfolder: str | None = None,
    present: str | None = None,
    beside: str | Path | None = None,
    overwrite: bool = False,
    **details: Any,
) -> WrittenCard:
    """Make or update the card of an adapter's folder.

    A README.md that another library made from a template, or that is ours and unchanged, is made anew; its text
    outside our marks is kept. If somebody has written or changed it, only its metadata is updated.

    Args:
        folder: The adapter's own folder, or a folder with adapters in folders of their names.
        config: The adapter's configuration, if it is not in the folder yet.
        repo_id: The adapter's repository on the Hub.
        subfolder: The adapter's folder in the repository, if it has one.
        present: The text to update, in place of the text of the folder's README.md.
        beside: A folder that has more adapters, in folders of their names.
        overwrite: Replace text that somebody has written or changed.
        **details: `tags`, which are added to the metadata; `base_class`, the class of the base model, if the
            configuration does not have it; `training`, Markdown on the training run that ended with the adapter.

    Returns:
        What was done.

    Raises:
        ValueError: If the folder holds no adapter of ours.
    """
    folder = Path(folder)
    facts = gather_facts(folder, config)
    if facts.subfolder and beside is not None:
        more = {name: plain(other.described) for name, other in own_adapters(Path(beside)) if name != facts.subfolder}
        facts.others = more | facts.others
    details["base_class"] = facts.base_class or details.get("base_class")
    facts = replace(facts, repo_id=repo_id, subfolder=subfolder or facts.subfolder, **details)
    return write_readme(folder / CARD, rendered(facts), present, overwrite=overwrite)


def gather_facts(folder: Path, config: ChildConfig | None = None) -> CardFacts:
    """Gather the facts of the adapter in a folder; its picture is drawn if there is none.

    Pictures that an earlier adapter has left in the folder are not among the facts.
    """
    found = {"": config} if config is not None else dict(own_adapters(folder))
    if not found:
        raise ValueError(f"{folder} holds no adapter of hf_erasure: it has no {CONFIG} of such an adapter.")
    name, chosen = next(iter(found.items()))
    own = folder / name
    facts = facts_of(chosen)
    drawn = draw(facts, own)
    pictures = {file: text for file, text in DRAWN.items() if file == drawn}
    pictures |= OF_RECIPE if RECIPE in chosen.provenance else {}
    facts.pictures = {file: text for file, text in pictures.items() if (own / file).is_file()}
    if name:
        facts.subfolder = name
        facts.pictures = {f"{name}/{file}": text for file, text in facts.pictures.items()}
        facts.others = {other: plain(found[other].described) for other in found if other != name}
    return facts


def own_adapters(folder: Path) -> Iterator[tuple[str, ChildConfig]]:
    """Adapters of ours in a folder: the one of the folder itself, or else those of folders within it."""
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
    """The configuration of the adapter in a folder, if it is one of ours."""
    content = read_object(folder / CONFIG)
    kinds = {"CONCEPT_ERASURE": ConceptErasureConfig, "GRADIEND": GradiendConfig}
    kind = kinds.get(str(content.get("peft_type")))
    return None if kind is None else kind.from_pretrained(str(folder))


def holds_adapters_only(folder: Path) -> bool:
    """Whether a folder is one of our adapters, or has only such adapters in it, so that its card is ours to write."""
    if config_in(folder) is None and any((folder / name).exists() for name in _MODEL_FILES):
        return False
    return next(own_adapters(folder), None) is not None


def write_saved_card(folder: Path, model: Any, adapter_name: str) -> None:
    """Write the card of an adapter that is about to be saved, and of the folder with several; see `ON_STAGED`."""
    known, root = model_facts(model), root_of(folder)
    write_or_warn(folder, write_card, model.peft_config[adapter_name], **known)
    if root == folder:
        return
    target = target_of(root)
    # If the adapter of another method is there, its card is not ours to write.
    is_ours = next(own_adapters(root), None) is not None
    is_free = holds_adapters_only(target) or not any((target / name).exists() for name in _MODEL_FILES)
    if is_ours and is_free:
        write_or_warn(root, write_card, beside=target, **known)


def model_facts(model: Any) -> dict[str, Any]:
    """The tags and the class of the base model, for the card of an adapter of the model."""
    base = base_of(model) if hasattr(model, "get_base_model") else model
    library = ["transformers"] if isinstance(base, PreTrainedModel) else []
    return {"tags": [*library, *(getattr(base, "model_tags", None) or [])], "base_class": type(base).__name__}


def write_or_warn(where: Path, write: Callable[..., WrittenCard], *args: Any, **kwargs: Any) -> None:
    """Write a card into a folder; an adapter is worth more than its card, so an error becomes a warning."""
    try:
        written = write(where, *args, **kwargs)
    except Exception as error:
        warn_user(f"The card of the adapter in {where} could not be written: {type(error).__name__}: {error}")
        return
    if written.outcome == "left":
        warn_user(str(written))


# ---- what an adapter becomes -----------------------------------------------------------------------------------------


def write_merged_card(folder: str | Path, model: str, adapter: str | Path, what: str) -> WrittenCard:
    """Make the card of a checkpoint that an adapter (a folder, or its name on the Hub) was merged into.

    `model` is the base, a folder or its name on the Hub; `what` says what was merged, in a sentence.
    """
    folder = Path(folder)
    config = adapter_config(adapter)
    if not isinstance(config, ChildConfig):
        raise ValueError(f"{str(adapter)!r} holds a {config.peft_type} adapter, which is not one of hf_erasure.")
    facts = facts_of(config)
    facts.base_id = facts.base_id or hub_id(model)
    names = read_object(folder / "config.json").get("architectures") or [None]
    head = HEAD_OF.get(names[0] if isinstance(names[0], str) else None)
    title = f"{facts.base_id or facts.base_class or 'A model'} with {_noun(facts)} merged into its weights"
    names_of = {"what": what, "adapter": hub_id(str(adapter))}
    card = fill_template(facts, "merged", title, head, ["merged", "debiasing"], "transformers", **names_of)
    return write_readme(folder / CARD, card)


def export_to_lora(model: nn.Module, adapter_name: str, folder: str | Path, *, rank: int | None = None) -> LoraExport:
    """Write an adapter as a stock LoRA with its card; `PeftModel.from_pretrained(base, folder)` loads it by itself.

    An erasure is exported exactly. A GRADIEND adapter becomes its nearest LoRA of a rank, at its present strength;
    its changes of norms, biases and other parameters that are not matrices are left out, and the text says how much of
    the edit this is.

    Args:
        model: The model with the fitted adapter, or a module that contains it. It is not changed.
        adapter_name: The adapter; it is exported as it acts alone.
        folder: Where `adapter_config.json`, `adapter_model.safetensors` and `README.md` are written.
        rank: The rank of the LoRA for a GRADIEND adapter; 16 when None. An erasure has its own rank.

    Returns:
        What was written, what could not be written, and where PEFT can apply the LoRA but not merge it.

    Raises:
        ValueError: If the adapter is not fitted, is merged, or has a site that is not a linear layer and whose
            activation does not go into linear layers only; names the site and what stands in the way.
    """
    exported = export(model, adapter_name, folder, rank=rank)
    facts = facts_of(adapter_of(model, adapter_name, ChildConfig).config)
    head, noun = HEAD_OF.get(facts.base_class), _noun(facts)
    title = f"{noun[:1].upper()}{noun[1:]} as a LoRA" + (f" for {facts.base_id}" if facts.base_id else "")
    reasons = list(dict.fromkeys(exported.unmergeable.values()))
    card = fill_template(facts, "lora", title, head, ["lora", "debiasing"], exported=exported, reasons=reasons)
    write_readme(exported.folder / CARD, card)
    return exported


def _noun(facts: CardFacts) -> str:
    what = "an erasure of" if facts.kind == "concept_erasure" else "a GRADIEND edit of"
    return plain(f"{what} “{facts.concept}”")


# ---- a README.md that is there --------------------------------------------------------------------------------------


def is_generic(text: str) -> bool:
    """Whether a card's text, without its metadata, is what a library writes by itself, and nothing else."""
    without_comments = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    lines = [line.strip() for line in without_comments.splitlines() if line.strip()]
    template = TEMPLATE_MODELCARD_PATH.read_text(encoding="utf-8").splitlines()
    headings = {line.strip() for line in template if line.startswith("##")}
    return all(line in headings or _LIBRARY_LINES.fullmatch(line) for line in lines)


def has_own_text(present: str | None) -> bool:
    """Whether somebody has written into a README.md, so that it must not be replaced by another."""
    if present is None:
        return False
    text = REGEX_YAML_BLOCK.sub("", present.replace("\r\n", "\n"), count=1)
    found = unchanged_block(text)
    if found is not None:
        text = text[: found.start()] + text[found.end() :]
    return bool(text.strip()) and not is_generic(text)


def write_readme(path: Path, card: Card, present: str | None = None, *, overwrite: bool = False) -> WrittenCard:
    """Bring a README.md up to date by `updated_readme`, from the text `present`, or else from the text of the file."""
    try:
        present = text_of(path) if present is None else present
    except UnicodeDecodeError as error:
        return WrittenCard(path, "left", f"it is not text in UTF-8 ({error}). Correct or delete it.")
    text, outcome, reason = updated_readme(present, card, overwrite=overwrite)
    if outcome != "left":
        write_text(path, text)
    return WrittenCard(path, outcome, reason)


def text_of(path: Path) -> str | None:
    """The text of a README.md; None if there is no such file."""
    return path.read_bytes().decode("utf-8-sig") if path.is_file() else None


def updated_readme(present: str | None, card: Card, *, overwrite: bool = False) -> tuple[str, str, str]:
    """A README.md with the card in it: its new text, the outcome and its reason, as in `WrittenCard`."""
    if present is None or not present.strip():
        return str(card), "made", ""
    try:
        readme = ModelCard(present)
        data = merged_metadata(readme.data, card.data)
    except _METADATA_ERRORS as error:
        return present, "left", f"its metadata cannot be read ({plain(error)}). Correct or delete it."
    text = readme.text.replace("\r\n", "\n")
    if is_generic(text) or overwrite:
        return str(Card(data, card.text)), "made anew" if overwrite else "made", ""
    found = unchanged_block(text)
    if found is None:
        readme.data = data
        return str(readme), "metadata", ""
    kept = f"{text[: found.start()].lstrip()}{card.block}{text[found.end() :].rstrip()}"
    return f"---\n{data.to_yaml()}\n---\n\n{kept}\n", "made anew", ""


def merged_metadata(present: Any, ours: ModelCardData) -> ModelCardData:
    """Merge the metadata of a card with ours: ours for all that is about the adapter, the card's for the rest."""
    found: Any = ModelCardData()
    found.__dict__.update(present.__dict__)
    found.library_name = ours.library_name
    # The base models that a card names stay, except for paths on somebody's disk.
    base = present.base_model
    named = [name for name in base if hub_id(name)] if isinstance(base, list) else hub_id(base)
    found.base_model = ours.base_model or named or None
    relation = ours.get("base_model_relation") or present.get("base_model_relation")
    found["base_model_relation"] = relation if found.base_model else None
    found.tags = [tag for tag in _union(present.tags) if not tag.startswith(REPLACED_TAGS)]
    found.eval_results = [r for r in present.eval_results or [] if (r.metric_args or {}).get("measured_by") != OURS]
    _add_metadata(found, ours)
    found.tags = _union(found.tags, adapter_tags(found.base_model) if found.library_name == "peft" else [])
    if not found.eval_results:
        found.eval_results = found.model_name = None
    return found


def with_metadata(present: str, other: str | None) -> str:
    """Add the metadata of another README.md to a README.md; return it unchanged if one of them cannot be read."""
    if not other:
        return present
    try:
        card = ModelCard(present)
        _add_metadata(card.data, ModelCard(other).data)
        return str(card)
    except _METADATA_ERRORS:
        return present


def _add_metadata(data: Any, more: Any) -> None:
    """Add licence, languages, task, data sets, tags and results of other metadata; newer results replace the same."""
    for name in ("license", "language", "pipeline_tag"):
        data[name] = data.get(name) or more.get(name)
    data.tags, data.datasets = _union(data.tags, more.tags) or None, _union(data.datasets, more.datasets) or None
    if more.eval_results:
        new = more.eval_results
        kept = [r for r in data.eval_results or [] if not any(r.is_equal_except_value(other) for other in new)]
        data.eval_results, data.model_name = [*kept, *new], data.model_name or more.model_name


def _union(*lists: Any) -> list[str]:
    """All lists one after the other, nothing twice; a text stands for a list of one."""
    known = [value if isinstance(value, (list, tuple)) else [value] for value in lists if value is not None]
    return list(dict.fromkeys(str(entry) for value in known for entry in value))
