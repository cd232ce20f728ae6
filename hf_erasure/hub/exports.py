"""Cards of what an adapter becomes: a merged checkpoint, which transformers loads alone, and a stock LoRA."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData
from peft import PeftConfig
from torch import nn

from hf_erasure.adapters import LoraExport
from hf_erasure.adapters import export_to_lora as export
from hf_erasure.adapters.common.config import ChildConfig
from hf_erasure.adapters.common.files import CARD, write_text
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.models.heads import Head, head_of

from .cards import Card, WrittenCard, text_of, updated
from .facts import CardFacts, facts_of, hub_id
from .markdown import plain
from .measured import read_json
from .metadata import OURS, peft_tags
from .templates import render


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
    facts = _facts(config, Path(adapter), model)
    names = read_json(folder / "config.json").get("architectures") or [None]
    head = head_of(names[0] if isinstance(names[0], str) else None)
    data = _data(facts, head, library="transformers", tag="merged", relation="finetune")
    title = f"{facts.base_id or facts.base_class or 'A model'} with {_noun(facts)} merged into its weights"
    values = {"what": what, "adapter": hub_id(str(adapter)), "auto_class": head.auto_class if head else "AutoModel"}
    return _write(folder, Card(data, render("merged", facts=facts, title=title, **values)))


def export_to_lora(model: nn.Module, adapter_name: str, folder: str | Path, *, rank: int | None = None) -> LoraExport:
    """Write an adapter as a stock LoRA with its card, which `PeftModel.from_pretrained(base, folder)` loads without us.

    An erasure is exported exactly. A GRADIEND adapter becomes its nearest LoRA of a rank, at its present strength;
    what it changes in norms, biases and other parameters that are no matrices is left out, and the text says how much
    that is.

    Args:
        model: The model with the fitted adapter, or whatever it is inside of. It is not changed.
        adapter_name: The adapter; it is exported as it acts alone.
        folder: Where `adapter_config.json`, `adapter_model.safetensors` and `README.md` are written.
        rank: Of the LoRA, for a GRADIEND adapter; 16 when left out. An erasure has its own.

    Returns:
        What was written, what could not be, and where PEFT can use it but not merge it.

    Raises:
        ValueError: If the adapter is not fitted, is merged, or has a site that is no linear layer and whose activation
            does not go into linear layers only; names the site and what stands in the way.
    """
    exported = export(model, adapter_name, folder, rank=rank)
    write_lora_card(exported, adapter_of(model, adapter_name, ChildConfig).config)
    return exported


def write_lora_card(exported: LoraExport, config: ChildConfig) -> WrittenCard:
    """Make the card of a LoRA that an adapter was exported to."""
    facts = _facts(config, None, None)
    head = head_of(facts.base_class)
    data = _data(facts, head, library="peft", tag="lora", relation="adapter")
    noun, where = _noun(facts), f" for {facts.base_id}" if facts.base_id else ""
    title = f"{noun[:1].upper()}{noun[1:]} as a LoRA{where}"
    reasons = list(dict.fromkeys(exported.unmergeable.values()))
    values = {"exported": exported, "reasons": reasons, "auto_class": head.auto_class if head else "AutoModel"}
    return _write(exported.folder, Card(data, render("lora", facts=facts, title=title, **values)))


def _facts(config: ChildConfig, folder: Path | None, model: str | None) -> CardFacts:
    facts = facts_of(config, folder if folder is not None and folder.is_dir() else None)
    facts.base_id = facts.base_id or hub_id(model)
    return facts


def _data(facts: CardFacts, head: Head | None, *, library: str, tag: str, relation: str) -> ModelCardData:
    data = ModelCardData(
        library_name=library,
        base_model=facts.base_id,
        pipeline_tag=None if head is None else head.pipeline_tag,
        tags=[OURS, tag, "debiasing", *(peft_tags(facts) if relation == "adapter" else [])],
        datasets=facts.datasets or None,
        license=facts.license,
        language=facts.language or None,
    )
    if facts.base_id is not None:
        data["base_model_relation"] = relation
    return data


def _noun(facts: CardFacts) -> str:
    what = "an erasure of" if facts.kind == "concept_erasure" else "a GRADIEND edit of"
    return plain(f"{what} “{facts.concept}”")


def _write(folder: Path, card: Card) -> WrittenCard:
    path = folder / CARD
    try:
        present = text_of(path)
    except UnicodeDecodeError as error:
        return WrittenCard(path, "left", f"it is no text in UTF-8 ({error}). Mend or delete it.")
    text, outcome, reason = updated(present, card)
    if outcome != "left":
        write_text(path, text)
    return WrittenCard(path, outcome, reason)
