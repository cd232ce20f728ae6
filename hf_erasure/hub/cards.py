"""The cards of adapters in a folder, of what they are merged into and exported to, and of what is being saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from hf_erasure.adapters import ConceptErasureConfig, GradiendConfig, LoraExport
from hf_erasure.adapters import export_to_lora as export
from hf_erasure.adapters.common.config import ChildConfig
from hf_erasure.adapters.common.files import CARD, CONFIG, root_of, target_of
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.models.heads import head_of
from hf_erasure.models.model import without_peft

from .facts import PICTURES, CardFacts, facts_of, hub_id, plain, read_object
from .readme import WrittenCard, write_into
from .rendering import Card, draw, metadata_of, render, rendered

_MODEL_FILES = ("config.json", CONFIG)


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
    return write_into(folder / CARD, rendered(facts), present, overwrite=overwrite)


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
        facts.pictures = {file: text for file, text in PICTURES.items() if file in (drawn, *facts.pictures)}
    if name:
        facts.subfolder = name
        facts.pictures = {f"{name}/{file}": text for file, text in facts.pictures.items()}
        facts.others = {other: plain(found[other].described) for other in found if other != name}
    return facts


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
    content = read_object(folder / CONFIG)
    kinds = {"CONCEPT_ERASURE": ConceptErasureConfig, "GRADIEND": GradiendConfig}
    kind = kinds.get(str(content.get("peft_type")))
    return None if kind is None else kind.from_pretrained(str(folder))


def holds_adapters_only(folder: Path) -> bool:
    """Whether a folder is one of our adapters, or has only such in it: its card is ours to write."""
    if config_in(folder) is None and any((folder / name).exists() for name in _MODEL_FILES):
        return False
    return next(own_adapters(folder), None) is not None


# ---- saving ----------------------------------------------------------------------------------------------------------


def write_saved_card(folder: Path, model: Any, adapter_name: str) -> None:
    """Write the card of an adapter that is about to be saved, and of the folder with several; see `ON_STAGED`."""
    known, root = told_by(model), root_of(folder)
    kept_quiet(folder, lambda: write_card(folder, model.peft_config[adapter_name], redraw=True, **known))
    if root == folder:
        return
    target = target_of(root)
    # The card of another method's adapter that lies there is not ours to write.
    is_ours = next(own_adapters(root), None) is not None
    is_free = holds_adapters_only(target) or not any((target / name).exists() for name in _MODEL_FILES)
    if is_ours and is_free:
        kept_quiet(root, lambda: write_card(root, beside=target, **known))


def told_by(model: Any) -> dict[str, Any]:
    """What the model tells of the base, for the card of an adapter of it."""
    base = without_peft(model)
    library = ["transformers"] if isinstance(base, PreTrainedModel) else []
    return {"tags": [*library, *(getattr(base, "model_tags", None) or [])], "base_class": type(base).__name__}


def kept_quiet(where: Any, write: Callable[[], WrittenCard]) -> None:
    """An adapter is worth more than its card: what goes wrong with the card is said, and stops no save."""
    try:
        written = write()
    except Exception as error:
        warnings.warn(
            f"The card of the adapter in {where} could not be written: {type(error).__name__}: {error}", stacklevel=4
        )
        return
    if written.outcome == "left":
        warnings.warn(str(written), stacklevel=4)


# ---- what an adapter becomes -----------------------------------------------------------------------------------------


def write_merged_card(folder: str | Path, model: str, adapter: str | Path, what: str) -> WrittenCard:
    """Make the card of a checkpoint that an adapter was merged into.

    Args:
        folder: Where the checkpoint lies.
        model: The base: a folder, or its name on the Hub.
        adapter: The adapter: a folder, or its name on the Hub.
        what: What was merged, in a sentence.

    Raises:
        ValueError: If there is no adapter of ours.
    """
    folder = Path(folder)
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, ChildConfig):
        raise ValueError(f"{str(adapter)!r} holds a {config.peft_type} adapter, and none of hf_erasure.")
    facts = facts_of(config, Path(adapter) if Path(adapter).is_dir() else None)
    facts.base_id = facts.base_id or hub_id(model)
    names = read_object(folder / "config.json").get("architectures") or [None]
    head = head_of(names[0] if isinstance(names[0], str) else None)
    title = f"{facts.base_id or facts.base_class or 'A model'} with {_noun(facts)} merged into its weights"
    text = render("merged", facts, title, head, what=what, adapter=hub_id(str(adapter)))
    data = metadata_of(facts, head, ["merged", "debiasing"], library="transformers")
    return write_into(folder / CARD, Card(data, text))


def export_to_lora(model: nn.Module, adapter_name: str, folder: str | Path, *, rank: int | None = None) -> LoraExport:
    """Write an adapter as a stock LoRA with its card, which `PeftModel.from_pretrained(base, folder)` loads without us.

    An erasure is exported exactly. A GRADIEND adapter becomes its nearest LoRA of a rank, at its present strength;
    what it changes in norms, biases and other parameters that are not matrices is left out, and the text says how much
    that is.

    Args:
        model: The model with the fitted adapter, or whatever it is inside of. It is not changed.
        adapter_name: The adapter; it is exported as it acts alone.
        folder: Where `adapter_config.json`, `adapter_model.safetensors` and `README.md` are written.
        rank: Of the LoRA, for a GRADIEND adapter; 16 when left out. An erasure has its own.

    Returns:
        What was written, what could not be, and where PEFT can use it but not merge it.

    Raises:
        ValueError: If the adapter is not fitted, is merged, or has a site that is not a linear layer and whose
            activation does not go into linear layers only; names the site and what stands in the way.
    """
    exported = export(model, adapter_name, folder, rank=rank)
    write_lora_card(exported, adapter_of(model, adapter_name, ChildConfig).config)
    return exported


def write_lora_card(exported: LoraExport, config: ChildConfig) -> WrittenCard:
    """Make the card of a LoRA that an adapter was exported to."""
    facts = facts_of(config)
    head, noun = head_of(facts.base_class), _noun(facts)
    title = f"{noun[:1].upper()}{noun[1:]} as a LoRA" + (f" for {facts.base_id}" if facts.base_id else "")
    reasons = list(dict.fromkeys(exported.unmergeable.values()))
    text = render("lora", facts, title, head, exported=exported, reasons=reasons)
    return write_into(exported.folder / CARD, Card(metadata_of(facts, head, ["lora", "debiasing"]), text))


def _noun(facts: CardFacts) -> str:
    what = "an erasure of" if facts.kind == "concept_erasure" else "a GRADIEND edit of"
    return plain(f"{what} “{facts.concept}”")
