"""Erasures that are used without the library: folded into weights, or written as an ordinary LoRA."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

from hf_erasure import ConceptErasureConfig, GradiendConfig, export_to_lora, fit_concept_erasure, set_strength
from hf_erasure.adapters import erasure_layers
from hf_erasure.adapters.merging import record
from hf_erasure.adapters.merging.export import low_rank
from hf_erasure.cli import app
from hf_erasure.erasers import Eraser
from tests.adapters.lifecycle import MERGE_TOLERANCE, State
from tests.prepared import TRANSFORMERS, run, run_code
from tests.small_models import (
    _GROUPED,
    _TEXT,
    ARCHITECTURES,
    LABELS,
    SITES,
    distance,
    outputs_of,
    roughen,
    same,
    small_batch,
    small_batches,
    small_model,
)

# Architectures beyond the ten of `ARCHITECTURES`, which have other modules between a norm and the layers after it.
MORE: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_GROUPED, num_local_experts=4)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**{**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "tie_word_embeddings": False})
    ),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**{**_GROUPED, "tie_word_embeddings": False})),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)),
}
# Covers sums over at most 64 columns in float32, after two blocks; it is the bound that the specification demands.
LORA_TOLERANCE = 1e-5


@functools.cache
def _made(architecture: str) -> PreTrainedModel:
    if architecture in ARCHITECTURES:
        return small_model(architecture)
    return roughen(MORE[architecture](), torch.Generator().manual_seed(7)).eval()


def base_of(architecture: str) -> PreTrainedModel:
    return copy.deepcopy(_made(architecture))


def text_like(architecture: str) -> str:
    """The architecture whose inputs suit this one."""
    return architecture if architecture in ARCHITECTURES else "llama"


def batch_of(architecture: str, seed: int = 5) -> dict[str, Tensor]:
    return small_batch(text_like(architecture), seed=seed)


@functools.cache
def _fitted(
    architecture: str, targets: Any, affine: bool | None, site: str, excluded: tuple[str, ...]
) -> PreTrainedModel:
    model = base_of(architecture)
    config = ConceptErasureConfig(
        labels=LABELS,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        exclude_modules=list(excluded) or None,
        affine=affine,
        site=site,
        task_type=ARCHITECTURES[architecture].task_type if architecture in ARCHITECTURES else "CAUSAL_LM",
    )
    model.add_adapter(config, adapter_name="gender")
    batches = [small_batch(text_like(architecture), seed=100, rows=48)]
    fit_concept_erasure(model, batches, "gender", sequential=False, progress=False)
    return model


def fitted(
    architecture: str,
    targets: Any = None,
    *,
    affine: bool | None = True,
    site: str = "output",
    excluded: tuple[str, ...] = (),
) -> PreTrainedModel:
    """The architecture's small model with a fitted erasure `gender`; a copy."""
    return copy.deepcopy(_fitted(architecture, targets, affine, site, excluded))


def wrapped(model: PreTrainedModel, architecture: str, folder: Path) -> peft.PeftModel:
    """The same adapter on a fresh model, as PEFT loads it; PEFT's model has the merge methods."""
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(base_of(architecture), folder)


# ---- the table of architectures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Norms of an architecture, and whether an erasure of their output can be merged.

    Attributes:
        sites: A regular expression for the norms.
        refusal: Words of the message that refuses every erasure; None where a linear erasure can be folded.
        affine: Words of the message that refuses an affine erasure; None where it can be folded too.
    """

    architecture: str
    sites: str
    refusal: str | None = None
    affine: str | None = None

    def __str__(self) -> str:
        return f"{self.architecture}-{self.sites}"


NO_BIAS = "would need a bias"
TIED = "the weight of 'lm_head' is shared by"
RETURNED = "is part of what {} returns"
TABLE = [
    Row("bert", r"encoder.layer.\d.attention.output.LayerNorm", "goes into `add`"),
    Row("bert", r"encoder.layer.0.output.LayerNorm", "goes into `add`"),
    Row("bert", r"encoder.layer.1.output.LayerNorm", RETURNED.format("BertModel")),
    Row("distilbert", r"transformer.layer.\d.sa_layer_norm", "goes into `add`"),
    Row("distilbert", r"transformer.layer.0.output_layer_norm", "goes into `add`"),
    Row("distilbert", r"transformer.layer.1.output_layer_norm", RETURNED.format("DistilBertModel")),
    Row("roberta", r"encoder.layer.\d.attention.output.LayerNorm", "goes into `add`"),
    Row("roberta", r"encoder.layer.1.output.LayerNorm", RETURNED.format("RobertaModel")),
    Row("gpt2", r"transformer.h.\d.ln_[12]"),
    Row("gpt2", r"transformer.ln_f", TIED),
    Row("gpt_neox", r"gpt_neox.layers.\d.(input|post_attention)_layernorm"),
    Row("gpt_neox", r"gpt_neox.final_layer_norm", affine=NO_BIAS),
    Row("llama", r"model.layers.\d.input_layernorm", affine=NO_BIAS),
    Row("llama", r"model.layers.\d.post_attention_layernorm", affine=NO_BIAS),
    Row("llama", r"model.layers.\d.\w+_layernorm", affine=NO_BIAS),
    Row("llama", r"model.norm", affine=NO_BIAS),
    Row("qwen3", r"model.layers.\d.input_layernorm", affine=NO_BIAS),
    Row("qwen3", r"model.layers.\d.post_attention_layernorm", affine=NO_BIAS),
    Row("qwen3", r"model.layers.\d.self_attn.q_norm", "goes into `mul`"),
    Row("gemma", r"model.layers.\d.input_layernorm", affine=NO_BIAS),
    Row("gemma", r"model.layers.\d.post_attention_layernorm", affine=NO_BIAS),
    Row("gemma", r"model.norm", TIED),
    Row("t5", r"(en|de)coder.block.\d.layer.\d.layer_norm", affine=NO_BIAS),
    Row("t5", r"encoder.final_layer_norm", RETURNED.format("T5ForConditionalGeneration")),
    Row("t5", r"decoder.final_layer_norm", "goes into `mul`"),
    Row("vit", r"layers.\d.layernorm_(before|after)"),
    Row("vit", r"layernorm", RETURNED.format("ViTModel")),
    Row("mixtral", r"model.layers.\d.input_layernorm", affine=NO_BIAS),
    Row("mixtral", r"model.layers.\d.post_attention_layernorm", affine=NO_BIAS),
    Row("mixtral", r"model.norm", affine=NO_BIAS),
    Row("opt", r"model.decoder.layers.\d.(self_attn|final)_layer_norm"),
    Row("opt", r"model.decoder.final_layer_norm", affine=NO_BIAS),
    Row("gemma2", r"model.layers.\d.input_layernorm", affine=NO_BIAS),
    Row("gemma2", r"model.layers.\d.post_attention_layernorm", "goes into `add`"),
    Row("gemma2", r"model.layers.\d.pre_feedforward_layernorm", affine=NO_BIAS),
    Row("gemma2", r"model.layers.\d.post_feedforward_layernorm", "goes into `add`"),
    Row("gemma2", r"model.norm", affine=NO_BIAS),
    Row("phi3", r"model.layers.\d.input_layernorm", affine=NO_BIAS),
    Row("phi3", r"model.layers.\d.post_attention_layernorm", affine=NO_BIAS),
    Row("phi3", r"model.norm", affine=NO_BIAS),
]
# A refusal of every erasure comes before the code asks whether it is affine, so one of the two is tested there.
ROWS = [(row, affine) for row in TABLE for affine in (False, True) if affine or row.refusal is None]
every_row = pytest.mark.parametrize(("row", "affine"), ROWS, ids=lambda v: "-affine" if v is True else f"{v or ''}")


@every_row
def test_a_norm_folds_exactly_or_says_what_stands_in_the_way(row: Row, affine: bool, tmp_path: Path) -> None:
    model = fitted(row.architecture, row.sites, affine=affine)
    batch = batch_of(row.architecture)
    before_fit, erased = outputs_of(base_of(row.architecture), batch), outputs_of(model, batch)
    peft_model = wrapped(model, row.architecture, tmp_path)
    before = State(peft_model, batch)
    refusal = row.refusal or (row.affine if affine else None)
    if refusal is not None:
        first = next(iter(erasure_layers(model)))
        with pytest.raises(ValueError, match=f"(?s)'{re.escape(first)}' cannot be merged: .*{re.escape(refusal)}"):
            peft_model.merge_and_unload()
        before.assert_same(State(peft_model, batch))
        return

    peft_model.merge_adapter()
    merged = outputs_of(peft_model, batch)
    assert not same(merged, before_fit)
    assert distance(merged, erased) < MERGE_TOLERANCE[torch.float32]
    peft_model.unmerge_adapter()
    before.assert_same(State(peft_model, batch))

    plain = peft_model.merge_and_unload()
    assert plain.config.to_dict() == base_of(row.architecture).config.to_dict()
    plain.save_pretrained(tmp_path / "plain")
    reloaded = type(plain).from_pretrained(tmp_path / "plain")
    assert same(outputs_of(reloaded, batch), merged)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma", "t5", "vit", "gemma2"])
def test_following_the_advice_of_the_refusal_gives_an_adapter_that_folds(architecture: str, tmp_path: Path) -> None:
    refused = wrapped(fitted(architecture, affine=False), architecture, tmp_path / "refused")
    with pytest.raises(ValueError, match=r"exclude_modules=\[") as refusal:
        refused.merge_adapter()
    advice = re.findall(r"'([^']+)'", re.search(r"exclude_modules=(\[[^]]*\])", str(refusal.value))[1])
    model = fitted(architecture, affine=False, excluded=tuple(advice))
    assert erasure_layers(model).keys() == erasure_layers(refused).keys() - set(advice)
    mergeable = wrapped(model, architecture, tmp_path / "mergeable")
    batch = batch_of(architecture)
    erased = outputs_of(mergeable, batch)
    assert distance(outputs_of(mergeable.merge_and_unload(), batch), erased) < MERGE_TOLERANCE[torch.float32]


def test_the_advice_on_a_missing_bias_names_the_sites_that_need_one(tmp_path: Path) -> None:
    """GPT-NeoX has biases everywhere except at its head, which takes the output of the final norm."""
    refused = wrapped(fitted("gpt_neox"), "gpt_neox", tmp_path / "refused")
    advice = "affine=False, leave out the sites that need one, exclude_modules=['gpt_neox.final_layer_norm']"
    with pytest.raises(ValueError, match=re.escape("ConceptErasureConfig(affine=None)") + ".*" + re.escape(advice)):
        refused.merge_adapter()
    mergeable = wrapped(fitted("gpt_neox", excluded=("gpt_neox.final_layer_norm",)), "gpt_neox", tmp_path / "mergeable")
    erased = outputs_of(mergeable, batch_of("gpt_neox"))
    merged = outputs_of(mergeable.merge_and_unload(), batch_of("gpt_neox"))
    assert distance(merged, erased) < MERGE_TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("architecture", "advice"),
    [("bert", "target_modules='readers', which merges in this model"), ("gpt2", r"untie=True .* of its own\. Or fit")],
)
def test_the_refusal_at_norms_names_what_merges_and_that_merges(architecture: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=advice):
        wrapped(fitted(architecture, affine=False), architecture, tmp_path / "refused").merge_adapter()
    model, batch = fitted(architecture, "readers", affine=None, site="input"), batch_of(architecture)
    mergeable = wrapped(model, architecture, tmp_path / "mergeable")
    before, erased = State(mergeable, batch), outputs_of(mergeable, batch)
    mergeable.merge_adapter(untie="untie" in advice)
    assert distance(outputs_of(mergeable, batch), erased) < MERGE_TOLERANCE[torch.float32]
    mergeable.unmerge_adapter()
    before.assert_same(State(mergeable, batch))


# ---- conditions of folding, each in the smallest model that breaks it ------------------------------------------------


class Tiny(nn.Module):
    """Two norms and two linear layers; the subclasses differ in how they use them."""

    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"x": torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))}


class Plain(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Residual(Tiny):
    """The added view of the norm's output has no mark of the norm in its Python object."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.down(self.up(normed).relu()) + normed.view(-1, 6).reshape(x.shape)


class InPlace(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        normed[..., 0].mul_(2)
        return self.down(self.up(normed))


class OtherCall(Tiny):
    """The linear layer takes a second activation, which does not come from the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)) + self.up(self.other(x)))


class Parameter(Tiny):
    """A product with a weight that belongs to no linear layer, as in a router of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.down(self.up(normed) + nn.functional.linear(normed, self.router))


class HalfTheWeight(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.linear(self.norm(x), self.up.weight[:4]).repeat(1, 1, 2))


class Returned(Tiny):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(x)
        return self.down(self.up(normed)), normed[:, :1]


class Unused(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def tiny(cls: type[Tiny]) -> peft.PeftModel:
    model = roughen(cls(), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    wrapper = peft.get_peft_model(model, ConceptErasureConfig(labels=LABELS, target_modules=["norm"]))
    left, right = torch.randn(6, 1, generator=generator), torch.randn(1, 6, generator=generator)
    eraser = Eraser(left, right / (right @ left), torch.randn(6, generator=generator))
    erasure_layers(wrapper)["norm"].set_eraser("default", eraser, torch.float32)
    return wrapper


@pytest.mark.parametrize(
    ("cls", "obstacle"),
    [
        (Residual, "goes into `add`"),
        (InPlace, "goes into `mul_`"),
        (OtherCall, "'up', whose weight is used elsewhere too (another use)"),
        (Parameter, "goes into `mm`"),
        (HalfTheWeight, "goes into `mm`"),
        (Returned, "is part of what Returned returns"),
        (Unused, "was not reached"),
    ],
)
def test_what_is_no_plain_use_is_refused_by_name(cls: type[Tiny], obstacle: str) -> None:
    model = tiny(cls)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(obstacle)):
        model.merge_adapter()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_plain_use_is_folded_also_outside_of_transformers() -> None:
    model = tiny(Plain)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    erased = model(x)
    merged = model.merge_and_unload()(x)
    # Sums of at most 8 float32 products of numbers near one.
    torch.testing.assert_close(merged, erased, rtol=1e-5, atol=1e-5)


def test_an_erasure_that_stays_between_a_norm_and_its_layer_is_named() -> None:
    """Erasers of different concepts do not commute, so the outer one cannot be folded through the inner."""
    model = tiny(Plain)
    inner = ConceptErasureConfig(labels=LABELS, target_modules=["up"], site="input", sticky=True)
    model.add_adapter("inner", inner)
    generator = torch.Generator().manual_seed(4)
    left = torch.randn(6, 1, generator=generator)
    erasure_layers(model)["up"].set_eraser("inner", Eraser(left, left.T / left.square().sum(), None), torch.float32)
    x = torch.randn(4, 6, generator=generator)
    erased = model(x)
    with pytest.raises(ValueError, match="goes into `erasure of 'inner' at 'up'`"):
        model.merge_adapter(["default"])
    model.merge_adapter(["inner"])
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), erased, rtol=1e-5, atol=1e-5)  # as above


# ---- the check after a merge -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [[], ["second"]], ids=["alone", "beside another that is merged"])
def test_a_merge_that_changes_outputs_is_taken_back(
    others: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = fitted("llama", r"model.layers.\d.\w+_layernorm", affine=False)
    wrapper = wrapped(model, "llama", tmp_path)
    wrapper.load_adapter(tmp_path, "second")
    wrapper.base_model.set_adapter(["default", "second"])
    if others:
        wrapper.merge_adapter(others)
    before = State(wrapper, batch_of("llama"))
    honest = record.merged_parameters

    def wrong(*args: Any) -> dict[str, Tensor]:
        return {name: value * 1.001 for name, value in honest(*args).items()}

    monkeypatch.setattr(record, "merged_parameters", wrong)
    with pytest.raises(ValueError, match=r"changed the model's output by .* was taken back"):
        wrapper.merge_adapter(["default"] if others else None)
    before.assert_same(State(wrapper, batch_of("llama")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_merges_as_well_as_it_computes(dtype: torch.dtype, tmp_path: Path) -> None:
    """The check after a merge allows for the dtype; how good the merge is, the float32 outputs show."""
    model = fitted("llama", affine=False)
    exact = outputs_of(model, batch_of("llama"))
    model.save_pretrained(tmp_path)
    half = peft.PeftModel.from_pretrained(base_of("llama").to(dtype), tmp_path)
    unmerged = distance(_float(outputs_of(half, batch_of("llama"))), exact)
    half.merge_adapter()
    merged = distance(_float(outputs_of(half, batch_of("llama"))), exact)
    # Merging replaces the rounding of erased activations by that of merged weights; both are of the same size.
    assert merged < 2 * unmerged


def _float(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in outputs.items()}


def test_a_model_that_cannot_be_probed_merges_linear_sites_with_a_warning_and_folds_nothing() -> None:
    class Unprobed(Plain):
        dummy_inputs = {}  # noqa: RUF012

    with pytest.raises(ValueError, match="found by running the model on a dummy input"):
        tiny(Unprobed).merge_adapter()
    model = peft.get_peft_model(Unprobed(), ConceptErasureConfig(labels=LABELS, target_modules=["up"]))
    with pytest.warns(UserWarning, match="without the usual comparison of outputs"):
        model.merge_adapter()


def test_a_merge_uses_up_no_random_numbers_and_leaves_training_mode_on() -> None:
    model = tiny(Plain).train()
    state = torch.get_rng_state()
    model.merge_adapter()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_unmerging_one_site_leaves_the_others_in_a_weight_they_share() -> None:
    model = tiny(Plain)
    inner = ConceptErasureConfig(labels=LABELS, target_modules=["up"], sticky=True)
    model.add_adapter("after", inner)
    left = torch.randn(8, 1, generator=torch.Generator().manual_seed(4))
    erasure_layers(model)["up"].set_eraser("after", Eraser(left, left.T / left.square().sum(), None), torch.float32)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    erased, original = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    erasure_layers(model)["norm"].unmerge_weights()
    torch.testing.assert_close(model(x), erased, rtol=1e-5, atol=1e-5)  # sums of 8 float32 products
    assert not torch.equal(model.get_base_model().up.weight, original["base_model.model.up.weight"])
    erasure_layers(model)["up"].unmerge_weights()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


# ---- export to LoRA --------------------------------------------------------------------------------------------------

EXPORTABLE = [row for row in TABLE if row.refusal in (None, TIED)]
# An affine and a linear erasure in turn: one piece of code exports both, and puts the affine part into a bias. Every
# architecture of `ARCHITECTURES` or of the table has several cases, so both kinds occur in each.
IN_EXPERTS = [row for row in EXPORTABLE if row.architecture == "mixtral" and "post_attention" in row.sites]
EXPORTS = [
    *[(a, "all-linear", s, (i + j) % 2 == 0) for i, a in enumerate(ARCHITECTURES) for j, s in enumerate(SITES)],
    *[(row.architecture, row.sites, "output", n % 2 == 0) for n, row in enumerate(EXPORTABLE) if row not in IN_EXPERTS],
    *[(row.architecture, row.sites, "output", None) for row in IN_EXPERTS],
    ("gpt2", None, "output", True),  # the head is a Linear without a bias, tied, among Conv1D
    ("llama", None, "output", True),
    ("bert", ("word_embeddings",), "output", True),
    ("gpt2", ("wte",), "output", True),
    *[(a, "readers", "input", None) for a in ("gpt2", "llama", "bert", "t5", "vit", "gemma", "mixtral")],
    ("gpt_oss", "readers", "input", False),
    *[(a, "writers", "output", None) for a in ("llama", "gemma", "t5", "mixtral")],
]
SCRIPT = """
import copy, functools, sys, torch, transformers, peft
@functools.cache
def read(kind, folder):
    return getattr(transformers, kind).from_pretrained(folder)
for number, (kind, base, lora, batch) in enumerate(torch.load(sys.argv[1])):
    way = ("PeftModel", "load_adapter")[number % 2]
    model = copy.deepcopy(read(kind, base))
    if way == "PeftModel":
        model = peft.PeftModel.from_pretrained(model, lora)
    else:
        model.load_adapter(lora)
    with torch.no_grad():
        output = model.eval()(**batch)
    floats = {k: v for k, v in output.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    torch.save(floats, f"{lora}/outputs.pt")
assert not [name for name in sys.modules if name.startswith("hf_erasure")]
"""


def test_every_export_loads_where_this_package_is_not_imported_and_gives_the_same(tmp_path: Path) -> None:
    """All exports load in one process, which stands for a program that has PEFT but not this package."""
    jobs, expected = [], {}
    for architecture in {case[0] for case in EXPORTS}:
        base_of(architecture).save_pretrained(tmp_path / architecture)
    for number, (architecture, targets, site, affine) in enumerate(EXPORTS):
        model, batch = fitted(architecture, targets, affine=affine, site=site), batch_of(architecture)
        export_to_lora(model, "gender", tmp_path / str(number))
        expected[number] = outputs_of(model, batch)
        del batch["concept_labels"]
        jobs.append((type(model).__name__, str(tmp_path / architecture), str(tmp_path / str(number)), batch))
    torch.save(jobs, tmp_path / "jobs.pt")
    done = run(run_code, SCRIPT, str(tmp_path / "jobs.pt"), folder=tmp_path, kind=TRANSFORMERS)
    assert done.returncode == 0, done.stderr
    distances = {
        EXPORTS[number]: distance(torch.load(tmp_path / str(number) / "outputs.pt"), outputs)
        for number, outputs in expected.items()
    }
    assert {case: d for case, d in distances.items() if not d < LORA_TOLERANCE} == {}
    unchanged = [c for n, c in enumerate(EXPORTS) if same(expected[n], outputs_of(base_of(c[0]), batch_of(c[0])))]
    assert not unchanged


@pytest.mark.parametrize(("targets", "site"), [(IN_EXPERTS[0].sites, "output"), ("readers", "input")])
def test_a_mean_that_a_lora_of_a_parameter_has_no_bias_for_is_not_exported(targets: str, site: str, tmp_path: Path):
    model = fitted("mixtral", targets, affine=True, site=site)
    with pytest.raises(ValueError, match="has no bias"):
        export_to_lora(model, "gender", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (("bert", "all-linear", True), None),
        (("gpt2", r"transformer.h.\d.ln_[12]", True), None),
        (("llama", "all-linear", False), None),
        (("llama", "all-linear", True), "the affine part is a lora_bias, and the layer has no bias to merge it into"),
        (("gpt2", None, False), "its weight is shared with another module, which would change too"),
    ],
    ids=str,
)
def test_the_export_says_where_peft_cannot_merge_it(case: tuple, reason: str | None, tmp_path: Path) -> None:
    architecture, targets, affine = case
    model = fitted(architecture, targets, affine=affine)
    exported = export_to_lora(model, "gender", tmp_path)
    lora = peft.PeftModel.from_pretrained(base_of(architecture), tmp_path)
    modules = {n for n, m in lora.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert modules == set(exported.modules)
    assert {lora.get_submodule(f"base_model.model.{name}").scaling["default"] for name in modules} == {1.0}
    if reason is None:
        assert not exported.unmergeable
        merged = lora.merge_and_unload()
        batch = batch_of(architecture)
        assert distance(outputs_of(merged, batch), outputs_of(model, batch)) < LORA_TOLERANCE
        return
    assert set(exported.unmergeable.values()) == {reason}
    assert reason in str(exported) and next(iter(exported.unmergeable)) in str(exported)
    if "lora_bias" in reason:
        with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
            lora.merge_and_unload()


def test_a_lora_of_readers_meets_the_rules_of_a_serving_engine(tmp_path: Path) -> None:
    """The rules are those of vLLM's loader, in its files lora/peft_helper.py and lora/lora_model.py."""
    export_to_lora(fitted("llama", "readers", affine=False, site="input"), "gender", tmp_path)
    config, tensors = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    declared = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}
    assert config["r"] == config["lora_alpha"] == 1  # max_lora_rank is one of 1, 8, 16 …
    assert not any(
        config[name] for name in ("modules_to_save", "use_dora", "use_rslora", "lora_bias", "target_parameters")
    )
    assert config["bias"] == "none" and not config["rank_pattern"] and not config["alpha_pattern"]
    for name, tensor in tensors.items():
        module, part = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|lora_B)\.weight", name).groups()
        assert module.rpartition(".")[2] in declared
        assert tensor.shape[0 if part == "lora_A" else 1] == config["r"]


def test_ranks_that_differ_are_written_per_module(tmp_path: Path) -> None:
    """The erasures of a norm and of a layer behind it change one weight, whose LoRA needs the sum of their ranks."""
    model = fitted("llama", r"model.layers.\d.(input_layernorm|self_attn.q_proj|mlp.gate_proj)", affine=False)
    export_to_lora(model, "gender", tmp_path)
    lora = peft.PeftModel.from_pretrained(base_of("llama"), tmp_path)
    layers = {n: m for n, m in lora.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    ranks = {name.rpartition(".")[2]: layer.r["default"] for name, layer in layers.items()}
    assert ranks == {"q_proj": 2, "k_proj": 1, "v_proj": 1, "gate_proj": 1}
    batch = batch_of("llama")
    assert distance(outputs_of(lora, batch), outputs_of(model, batch)) < LORA_TOLERANCE


def test_an_adapter_is_exported_as_it_acts_alone_and_nothing_changes(tmp_path: Path) -> None:
    model = fitted("gpt_neox", affine=False)
    model.add_adapter(ConceptErasureConfig(labels=LABELS, sticky=True), adapter_name="other")
    fit_concept_erasure(model, small_batches("gpt_neox", seed=300), "other", sequential=False, progress=False)
    model.set_adapter(["gender", "other"])
    before = State(model, batch_of("gpt_neox"))
    export_to_lora(model, "gender", tmp_path)
    before.assert_same(State(model, batch_of("gpt_neox")))
    lora = peft.PeftModel.from_pretrained(base_of("gpt_neox"), tmp_path)
    alone = outputs_of(fitted("gpt_neox", affine=False), batch_of("gpt_neox"))
    assert distance(outputs_of(lora, batch_of("gpt_neox")), alone) < LORA_TOLERANCE


def test_what_cannot_be_exported_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LayerNorm' cannot be merged: its activation goes into `add`"):
        export_to_lora(fitted("bert"), "gender", tmp_path / "new")
    with pytest.raises(ValueError, match=r"lora_bias=True, and PEFT does not support this for 'transformer.wte'"):
        export_to_lora(fitted("gpt2", ("wte", "c_fc")), "gender", tmp_path / "new")
    with pytest.raises(ValueError, match=r"'nowhere' is not an hf_erasure adapter .*; those here are \['gender'\]"):
        export_to_lora(fitted("gpt2", ("c_fc",)), "nowhere", tmp_path / "new")
    unfitted = base_of("gpt2")
    unfitted.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=["c_fc"]), adapter_name="gender")
    with pytest.raises(ValueError, match="was never fitted"):
        export_to_lora(unfitted, "gender", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    merged = wrapped(fitted("gpt2", ("c_fc",)), "gpt2", tmp_path / "adapter")
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"call unmerge_adapter\(\) before"):
        export_to_lora(merged, "default", tmp_path / "new")
    merged.unmerge_adapter()
    with pytest.raises(ValueError, match=r"holds a CONCEPT_ERASURE adapter, which the LoRA would overwrite"):
        export_to_lora(merged, "default", tmp_path / "adapter")
    set_strength(merged, "default", 0)
    with pytest.raises(ValueError, match=r"changes nothing: its strength is 0"):
        export_to_lora(merged, "default", tmp_path / "new")


@pytest.mark.parametrize("road", ["PeftModel", "add_adapter"])
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_head_that_is_trained_with_the_adapter_is_in_the_lora(head: str, road: str, tmp_path: Path) -> None:
    """The task class of PEFT expects a head in the file, and finds none that was never trained."""
    task = {
        "SequenceClassification": "SEQ_CLS",
        "TokenClassification": "TOKEN_CLS",
        "QuestionAnswering": "QUESTION_ANS",
    }
    base = roughen(getattr(hf, f"BertFor{head}")(hf.BertConfig(**_TEXT)), torch.Generator().manual_seed(7)).eval()
    model: Any = copy.deepcopy(base)
    config = ConceptErasureConfig(labels=LABELS, target_modules=["query"], task_type=task[head])
    if road == "PeftModel":
        model = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(0.5 if "modules_to_save" in name else 0)
    else:
        model.add_adapter(config)
    fit_concept_erasure(model, small_batches("bert"), pool="cls", progress=False)
    text = str(export_to_lora(model, "default", tmp_path))
    assert ("and the adapter's" in text) == (road == "PeftModel")
    lora = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    batch = batch_of("bert")
    assert distance(outputs_of(lora, batch), outputs_of(model, batch)) < LORA_TOLERANCE


@pytest.mark.parametrize(("targets", "site"), [("query", "output"), ("readers", "input")])
def test_an_erasure_is_merged_through_a_wrapper_without_adapters(targets: str, site: str, tmp_path: Path) -> None:
    """PEFT leaves its wrappers in a model when the last LoRA is deleted."""
    targets = targets if targets == "readers" else (targets,)
    model = wrapped(fitted("bert", targets, site=site), "bert", tmp_path / "adapter")
    base, batch = model.get_base_model(), batch_of("bert")
    base.add_adapter(peft.LoraConfig(target_modules=["query"]), adapter_name="lora")
    base.delete_adapter("lora")
    base.set_adapter("default")
    erased = outputs_of(model, batch)
    model.merge_adapter(["default", "default"])  # a name that is given twice counts once
    assert distance(outputs_of(model, batch), erased) < MERGE_TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert same(outputs_of(model, batch), erased)
    assert model.unload().state_dict().keys() == base_of("bert").state_dict().keys()


def test_a_lora_around_a_layer_that_would_take_the_erasure_is_named(tmp_path: Path) -> None:
    """The matrices of the LoRA take the norm's output too, and belong to another adapter."""
    model = fitted("llama", ("input_layernorm",), affine=False)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]), adapter_name="lora")
    model.set_adapter(["gender", "lora"])
    with pytest.raises(ValueError, match=r"`the adapter around 'model.layers.0.self_attn.q_proj'`"):
        export_to_lora(model, "gender", tmp_path / "new")


def test_pefts_own_conversion_refuses_and_names_the_layer(tmp_path: Path) -> None:
    model = wrapped(fitted("gpt2", ("c_fc",)), "gpt2", tmp_path)
    with pytest.raises(TypeError, match="ErasureLayer"):
        peft.convert_to_lora(model, rank=1)
    assert not model.supports_lora_conversion()


def test_low_rank_keeps_the_largest_directions_and_says_how_much_that_is() -> None:
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(7, 3, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(5, 3, generator=generator, dtype=torch.float64))
    delta = u @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()) @ v.T
    a, b, kept = low_rank(delta, 2)
    # The singular values are 3, 2, 1 by construction; the tolerance is float64 rounding.
    assert kept == pytest.approx(13 / 14, abs=1e-12)
    assert float((delta - b @ a).norm()) == pytest.approx(1, abs=1e-12)
    assert low_rank(delta, 3)[2] == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="rank=6 is not between 1 and 5"):
        low_rank(delta, 6)


# ---- the command -----------------------------------------------------------------------------------------------------


def fit_stories(assets: Path, folder: Path, **fields: Any) -> tuple[Path, PreTrainedModel]:
    """An erasure at the block norms of a trained Llama, fitted on noise: how good it is does not matter here."""
    source = assets / "models" / "stories260k"
    model = hf.AutoModelForCausalLM.from_pretrained(source)
    config = {"labels": LABELS, "exclude_modules": ["model.norm"], **fields}
    model.add_adapter(ConceptErasureConfig(**config), adapter_name="gender")
    ids = torch.randint(3, 400, (16, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": torch.arange(16) % 2}
    fit_concept_erasure(model, [batch], "gender", sequential=False, progress=False)
    model.save_pretrained(folder)
    return source, model


def test_merge_writes_a_checkpoint_that_plain_transformers_runs(assets: Path, tmp_path: Path) -> None:
    source, model = fit_stories(assets, tmp_path / "adapter", affine=False)
    refused = CliRunner().invoke(app, ["merge", str(source), *[str(tmp_path / "adapter")] * 2])
    assert refused.exit_code == 2 and "holds an adapter: write the merged model into another" in refused.stderr
    result = CliRunner().invoke(app, ["merge", str(source), str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    assert f"at {len(erasure_layers(model))} sites" in result.stdout
    script = (
        "import sys, torch, transformers as hf\n"
        "model = hf.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "batch = hf.AutoTokenizer.from_pretrained(sys.argv[1])('Once upon a time', return_tensors='pt')\n"
        "torch.save((dict(batch), model(**batch).logits.detach()), sys.argv[2])\n"
        "assert not [name for name in sys.modules if name.startswith(('peft', 'hf_erasure'))]\n"
    )
    done = run(run_code, script, "merged", "outputs.pt", folder=tmp_path, kind=TRANSFORMERS)
    assert done.returncode == 0, done.stderr
    batch, logits = torch.load(tmp_path / "outputs.pt")
    expected = outputs_of(model, batch)["logits"]
    assert distance({"logits": logits}, {"logits": expected}) < MERGE_TOLERANCE[torch.float32]


@pytest.mark.parametrize("config", [ConceptErasureConfig(labels=LABELS), GradiendConfig(classes=LABELS)])
def test_an_adapter_that_was_never_fitted_is_not_merged(config: Any, assets: Path, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(assets / "models" / "stories260k")
    model.add_adapter(config)
    with pytest.warns(UserWarning, match="never fitted"):
        model.save_pretrained(tmp_path / "adapter")
    command = ["merge", str(assets / "models" / "stories260k"), str(tmp_path / "adapter"), str(tmp_path / "merged")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "changes nothing: it was never fitted" in result.stderr
    assert not (tmp_path / "merged").exists()


def test_merge_unties_on_request_and_says_what_it_costs(assets: Path, tmp_path: Path) -> None:
    source, model = fit_stories(assets, tmp_path / "adapter", exclude_modules=None, target_modules="readers")
    command = ["merge", str(source), str(tmp_path / "adapter"), str(tmp_path / "merged")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "--untie" in refused.stderr and "exclude_modules=['lm_head']" in refused.stderr
    # The table has 512 tokens with 64 float32 numbers each.
    with pytest.warns(UserWarning, match=rf"is {512 * 64 * 4:,} bytes larger, .*tie_word_embeddings=False"):
        result = CliRunner().invoke(app, [*command, "--untie"])
    assert result.exit_code == 0, result.output
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    batch = {"input_ids": torch.arange(3, 20)[None]}
    assert distance(outputs_of(merged, batch), outputs_of(model, batch)) < MERGE_TOLERANCE[torch.float32]


def test_export_lora_writes_a_stock_adapter_and_says_what_peft_cannot_do(assets: Path, tmp_path: Path) -> None:
    source, model = fit_stories(assets, tmp_path / "adapter", affine=True)
    result = CliRunner().invoke(app, ["export-lora", str(source), str(tmp_path / "adapter"), str(tmp_path / "lora")])
    assert result.exit_code == 0, result.output
    assert "PEFT applies it but cannot merge it at 'model.layers.0.self_attn.q_proj'" in result.stdout
    lora = peft.AutoPeftModel.from_pretrained(tmp_path / "lora")
    batch = {"input_ids": torch.arange(3, 20)[None]}
    assert distance(outputs_of(lora, batch), outputs_of(model, batch)) < LORA_TOLERANCE


def test_a_refusal_is_one_sentence_and_exit_code_2(assets: Path, tmp_path: Path) -> None:
    source, _ = fit_stories(assets, tmp_path / "adapter", exclude_modules=None)
    result = CliRunner().invoke(app, ["merge", str(source), str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert result.exit_code == 2
    assert "Error: The erasure at 'model.norm' cannot be merged" in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "merged").exists()
    lora = peft.get_peft_model(
        hf.AutoModelForCausalLM.from_pretrained(source), peft.LoraConfig(target_modules=["q_proj"])
    )
    lora.save_pretrained(tmp_path / "lora")
    result = CliRunner().invoke(app, ["export-lora", str(source), str(tmp_path / "lora"), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "holds a LORA adapter, which is not one of hf_erasure" in result.stderr.replace("PeftType.", "")
