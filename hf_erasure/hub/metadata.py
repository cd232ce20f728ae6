"""The YAML at the top of a card: made from facts, and merged into what somebody else wrote there."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_erasure.models.heads import head_of

from .facts import CardFacts, head, hub_id
from .markdown import plain

OURS = "hf-erasure"
_TAGS = {
    "concept_erasure": ["concept-erasure", "debiasing", "interpretability"],
    "gradiend": ["gradiend", "debiasing", "model-editing"],
}
# What a card had before ours may name another base, or a folder of somebody's disk.
_REPLACED_TAGS = ("base_model:",)


def metadata_of(facts: CardFacts, title: str) -> ModelCardData:
    """The metadata of an adapter's card."""
    _, task = head(facts)
    method = facts.method.get("name")
    tags = [OURS, *_TAGS[facts.kind], *([method] if method in ("leace", "inlp") else [])]
    tags = _together([*tags, *peft_tags(facts)], [t for t in facts.tags if not t.startswith(_REPLACED_TAGS)])
    data = ModelCardData(
        library_name="peft",
        base_model=facts.base_id,
        pipeline_tag=task,
        tags=tags,
        datasets=facts.datasets or None,
        license=facts.license,
        language=facts.language or None,
    )
    if facts.base_id is not None:
        data["base_model_relation"] = "adapter"
    results = [result for row in facts.measured for result in _results(row, task)]
    if results:
        data.model_name, data.eval_results = plain(title), results
    return data


def peft_tags(facts: CardFacts) -> list[str]:
    """What PEFT tells of an adapter in tags, besides its method: the base, and the library that this is for."""
    library = ["transformers"] if head_of(facts.base_class) is not None else []
    return [*_adapter_tags(facts.base_id), *library]


def _adapter_tags(base: Any) -> list[str]:
    """By these the Hub lists the adapters of a base model."""
    return [f"base_model:adapter:{name}" for name in _listed(base)]


def _results(row: dict[str, Any], task: str | None) -> list[EvalResult]:
    """A measure of the base and of the adapter, as the Hub lists them."""
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=OURS,
            dataset_name=row["data"] + (", other measures" if row["is_other"] else ""),
            metric_type=row["key"],
            metric_name=f"{row['title']} ({who})",
            metric_value=round(float(row[when]), 6),
            metric_args={"measured_by": OURS, "model": who},
        )
        for when, who in (("before", "base"), ("after", "with the adapter"))
        if row[when] is not None
    ]


def merged(present: Any, ours: ModelCardData) -> ModelCardData:
    """What a card says and what we know of the adapter: ours where it is about the adapter, theirs otherwise."""
    found = ModelCardData()
    found.__dict__.update(present.__dict__)
    found.library_name = ours.library_name
    found.base_model = ours.base_model or _on_hub(present.base_model)
    relation = ours.get("base_model_relation") or present.get("base_model_relation")
    if found.base_model is not None and relation:
        found["base_model_relation"] = relation
    else:
        found.pop("base_model_relation")
    of_base = _adapter_tags(found.base_model) if found.library_name == "peft" else []
    theirs = [tag for tag in _listed(present.tags) if not tag.startswith(_REPLACED_TAGS)]
    found.tags = _together(theirs, [*_listed(ours.tags), *of_base])
    found.datasets = _together(present.datasets, ours.datasets) or None
    for name in ("pipeline_tag", "license", "language"):
        found[name] = present.get(name) or ours.get(name)
    others = [result for result in present.eval_results or [] if not _is_ours(result)]
    found.eval_results = [*others, *(ours.eval_results or [])] or None
    found.model_name = (present.model_name or ours.model_name) if found.eval_results else None
    return found


def _is_ours(result: EvalResult) -> bool:
    return (result.metric_args or {}).get("measured_by") == OURS if isinstance(result.metric_args, dict) else False


def _on_hub(base: Any) -> Any:
    """The base models that a card names, without paths of somebody's disk."""
    if isinstance(base, list):
        return [name for name in base if hub_id(name)] or None
    return hub_id(base)


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(entry) for entry in value] if isinstance(value, (list, tuple)) else [str(value)]


def _together(theirs: Any, ours: Any) -> list[str]:
    """Both lists, theirs first, nothing twice."""
    return list(dict.fromkeys([*_listed(theirs), *_listed(ours)]))


def filled(present: str, more: Any) -> str:
    """A card with what another one knows besides: its licence, languages, data sets, tags and results."""
    card = ModelCard(present)
    data: Any = card.data
    for name in ("license", "language", "pipeline_tag"):
        if not data.get(name) and more.get(name):
            data[name] = more.get(name)
    data.tags = _together(data.tags, more.tags) or None
    data.datasets = _together(data.datasets, more.datasets) or None
    if more.eval_results:
        known = data.eval_results or []
        new = [r for r in more.eval_results if not any(r.is_equal_except_value(other) for other in known)]
        kept = [next((r for r in more.eval_results if r.is_equal_except_value(k)), k) for k in known]
        data.eval_results, data.model_name = [*kept, *new], data.model_name or more.model_name
    return str(card)
