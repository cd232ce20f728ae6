"""`combine_adapters`: one adapter that erases the concepts of several fitted adapters."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from peft.tuners.tuners_utils import check_target_module_exists
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from hf_erasure import ConceptErasureConfig, combine_adapters, fit_concept_erasure, verify_adapter
from hf_erasure.adapters import erasure_layers
from hf_erasure.erasers import Eraser, combine_erasers
from tests.adapters.gradiend.lifecycle import config_of as gradiend_config
from tests.adapters.lifecycle import Lifecycle, state_of
from tests.small_models import LABELS, inputs_of, outputs_of, same, small_batch, small_batches, small_model

FIRST = {"bert": "encoder.layer.0.attention.output.LayerNorm", "llama": "model.layers.0.input_layernorm"}
both_architectures = pytest.mark.parametrize("architecture", FIRST)
pytestmark = pytest.mark.filterwarnings("ignore:'both' was combined from erasers:UserWarning")


def token_batches(architecture: str, seed: int = 100) -> list[dict[str, Tensor]]:
    """The batches of `small_batches` with labels of tokens in the place of labels of sequences."""
    found = []
    for batch in small_batches(architecture, seed=seed):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        found.append({**batch, "concept_labels": torch.where(mask.bool(), ids % 3, -100)})
    return found


def add(model: nn.Module, name: str, data: list[dict[str, Tensor]], **fields: object) -> None:
    """Add an erasure and fit it in one pass, on activations that another adapter has not changed."""
    names = {"labels": LABELS} if name == "gender" else {"labels": ["a", "b", "c"]}
    model.add_adapter(ConceptErasureConfig(**{"concept": name, **names, **fields}), adapter_name=name)
    fit_concept_erasure(model, data, name, sequential=False, progress=False)


def with_two(lifecycle: Lifecycle, architecture: str, **fields: object) -> nn.Module:
    """A model with two erasures, of a concept of sequences and of a concept of tokens, fitted on the same rows."""
    model = lifecycle.base(architecture)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* switched the erasure 'gender' off")
        add(model, "gender", small_batches(architecture), **fields)
        add(model, "kind", token_batches(architecture), **fields)
    return model


def rows_at(model: nn.Module, sites: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs of modules at real positions, float64."""
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    handles = [
        model.get_submodule(site).register_forward_hook(lambda m, args, out, site=site: found[site].append(out))
        for site in sites
    ]
    with torch.no_grad():
        for batch in batches:
            model(**inputs_of(batch))
    for handle in handles:
        handle.remove()
    real = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    return {site: torch.cat(rows)[real].double() for site, rows in found.items()}


def classes_of(architecture: str, concept: str) -> Tensor:
    """The class of every real position, as one-hot values."""
    real = torch.cat([batch["attention_mask"] for batch in small_batches(architecture)]).bool()
    if concept == "kind":
        z = torch.cat([batch["concept_labels"] for batch in token_batches(architecture)])
    else:
        z = torch.cat(
            [b["concept_labels"][:, None].expand_as(b["attention_mask"]) for b in small_batches(architecture)]
        )
    return nn.functional.one_hot(z[real]).double()


def correlation(x: Tensor, z: Tensor, reference: Tensor) -> float:
    """Largest covariance of a feature with a class, relative to the product of their spreads before erasure."""
    cross = (x - x.mean(0)).T @ (z - z.mean(0)) / len(x)
    return float((cross.abs() / reference.std(0)[:, None] / z.std(0)).max())


def eraser_of(model: nn.Module, name: str, site: str) -> Eraser:
    return Eraser(*erasure_layers(model, name)[site].eraser_state(name))


# ---- what it erases --------------------------------------------------------------------------------------------------


@both_architectures
@pytest.mark.parametrize("method", ["leace", "orth"])
def test_removes_every_concept_at_every_site(architecture: str, method: str, lifecycle: Lifecycle):
    model = with_two(lifecycle, architecture, method=method)
    config = combine_adapters(model, ["gender", "kind"], "both")
    batches = small_batches(architecture)
    plain = rows_at(lifecycle.base(architecture), list(erasure_layers(model)), batches)
    for site, x in plain.items():
        eraser = eraser_of(model, "both", site)
        assert eraser.rank == 3 == config.fitted_sites[site]["rank"]
        for concept in ("gender", "kind"):
            z = classes_of(architecture, concept)
            assert correlation(x, z, x) > 0.1
            # Erasers are kept in float32, which rounds numbers by 6e-8; oblique ones multiply this by their norm.
            assert correlation(eraser(x), z, x) < 1e-5
    # Where nothing is erased upstream, the model with the adapter computes the same.
    model.set_adapter("both")
    seen = rows_at(model, [FIRST[architecture]], batches)[FIRST[architecture]]
    for concept in ("gender", "kind"):
        assert correlation(seen, classes_of(architecture, concept), plain[FIRST[architecture]]) < 1e-5


@both_architectures
def test_equals_an_adapter_of_the_joint_concept(architecture: str, lifecycle: Lifecycle):
    """The joint concept has the columns of both concepts, and is fitted once on the same rows."""
    model = with_two(lifecycle, architecture)
    combine_adapters(model, ["gender", "kind"], "both")
    joint = []
    for one, two in zip(small_batches(architecture), token_batches(architecture), strict=True):
        gender = nn.functional.one_hot(one["concept_labels"], 2)[:, None].expand(-1, one["input_ids"].shape[1], -1)
        kind = nn.functional.one_hot(two["concept_labels"].clamp_min(0), 3)
        values = torch.cat([gender, kind], dim=-1).float()
        joint.append({**one, "concept_labels": values})
    model.disable_adapters()
    model.add_adapter(ConceptErasureConfig(concept="joint", concept_dim=5), adapter_name="joint")
    fit_concept_erasure(model, joint, "joint", sequential=False, progress=False)
    plain = rows_at(lifecycle.base(architecture), list(erasure_layers(model)), small_batches(architecture))
    for site, x in plain.items():
        one, other = (eraser_of(model, name, site) for name in ("both", "joint"))
        assert one.rank == other.rank == 3
        # The bound covers means and covariances of float32 rows, float32 erasers, and the norms of the projections.
        assert float(((one(x) - other(x)).abs() / x.std(0)).max()) < 1e-4


def test_switched_on_together_a_part_of_the_second_concept_comes_back(lifecycle: Lifecycle):
    model = with_two(lifecycle, "bert", target_modules=[FIRST["bert"]])
    plain = rows_at(lifecycle.base("bert"), [FIRST["bert"]], small_batches("bert"))[FIRST["bert"]]
    left = {}
    for order in (["gender", "kind"], ["kind", "gender"]):
        model.set_adapter(order)
        seen = rows_at(model, [FIRST["bert"]], small_batches("bert"))[FIRST["bert"]]
        left[order[0]] = [correlation(seen, classes_of("bert", concept), plain) for concept in order]
    for first, second in left.values():
        assert first < 1e-5 and second > 1e-2
    combine_adapters(model, ["gender", "kind"], "both")
    for active in ("both", ["both", "gender"], ["kind", "both", "gender"]):
        model.set_adapter(active)
        seen = rows_at(model, [FIRST["bert"]], small_batches("bert"))[FIRST["bert"]]
        assert max(correlation(seen, classes_of("bert", c), plain) for c in ("gender", "kind")) < 1e-5


@pytest.fixture(scope="module")
def biographies(assets: Path) -> tuple[nn.Module, list[dict[str, Tensor]], dict[str, Tensor]]:
    """A trained BERT, biographies as its inputs, and the gender and the profession of each."""
    people = []
    for path in sorted((assets / "data" / "bias-in-bios").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            people += csv.DictReader(file)
    folder = assets / "models" / "story-mlm"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = {
        column: torch.tensor([sorted({p[column] for p in people}).index(p[column]) for p in people])
        for column in ("gender", "profession")
    }
    texts = [person["hard_text"] for person in people]
    encoded = tokenizer(texts, truncation=True, max_length=12, padding="max_length", return_tensors="pt")
    keys = ("input_ids", "attention_mask")
    batches = [{key: encoded[key][start : start + 100] for key in keys} for start in range(0, len(texts), 100)]
    return AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(), batches, labels


def test_no_probe_reads_either_concept_from_a_trained_model(biographies):
    model, batches, labels = biographies
    site = next(
        name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm) and name.startswith("encoder.")
    )

    def labelled(concept: str) -> Iterator[dict[str, Tensor]]:
        for number, batch in enumerate(batches):
            yield {**batch, "concept_labels": labels[concept][100 * number : 100 * number + 100]}

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* switched the erasure")
        for concept, count in (("gender", 2), ("profession", 3)):
            config = ConceptErasureConfig(concept=concept, labels=[str(n) for n in range(count)], target_modules=[site])
            model.add_adapter(config, adapter_name=concept)
            fit_concept_erasure(model, list(labelled(concept)), concept, sequential=False, progress=False)
        combine_adapters(model, ["profession", "gender"], "both")
    real = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    gains = {}
    for active in ("nothing", "gender", "both"):
        model.enable_adapters()
        model.set_adapter("gender" if active == "nothing" else active)
        if active == "nothing":
            model.disable_adapters()
        x = rows_at(model, [site], batches)[site]
        x = (x - x.mean(0)) / x.std(0)
        u, s, _ = torch.linalg.svd(x, full_matrices=False)
        # Directions in which the erasure left only rounding (float32 activations and erasers) are not features.
        features = (u[:, s > 1e-5 * s[0]] * len(x) ** 0.5).numpy()
        for concept in ("gender", "profession"):
            z = labels[concept][:, None].expand_as(real)[real].numpy()
            gains[active, concept] = logistic_gain(features, z), ols_r2(features, z)
    for concept in ("gender", "profession"):
        assert min(gains["nothing", concept]) > 1e-2, gains
        # float32 leaves correlations of 1e-6 over the smallest kept spread, and a gain is about their square.
        assert max(gains["both", concept]) < 1e-6, gains
    assert max(gains["gender", "gender"]) < 1e-6 < 1e-3 < min(gains["gender", "profession"])


def logistic_gain(features: np.ndarray, z: np.ndarray) -> float:
    """By how many nats the best logistic regression beats a prediction of the class shares."""
    chances = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(features, z).predict_proba(features)
    shares = np.bincount(z) / len(z)
    return float(-(shares * np.log(shares)).sum() + np.log(chances[np.arange(len(z)), z]).mean())


def ols_r2(features: np.ndarray, z: np.ndarray) -> float:
    """Training R² of least squares with the classes as values."""
    values = np.eye(z.max() + 1)[z]
    values = values - values.mean(0)
    centred = features - features.mean(0)
    solution = np.linalg.lstsq(centred, values, rcond=None)[0]
    return float(1 - ((values - centred @ solution) ** 2).sum() / (values**2).sum())


# ---- the adapter -----------------------------------------------------------------------------------------------------


@both_architectures
def test_saved_and_loaded(architecture: str, lifecycle: Lifecycle, tmp_path: Path):
    model, batch = with_two(lifecycle, architecture, task_type=None), small_batch(architecture, seed=5)
    combine_adapters(model, ["gender", "kind"], "both")
    assert model.active_adapters() == ["both"]
    assert verify_adapter(model, "both", batch)
    model.save_pretrained(tmp_path)
    loaded = lifecycle.base(architecture)
    loaded.load_adapter(tmp_path, adapter_name="x")
    assert same(outputs_of(loaded, batch), outputs_of(model, batch))
    wrapped = peft.PeftModel.from_pretrained(lifecycle.base(architecture), tmp_path)
    assert same(outputs_of(wrapped, batch), outputs_of(model, batch))
    model.delete_adapter("gender")
    model.delete_adapter("kind")
    model.set_adapter("both")
    assert same(outputs_of(loaded, batch), outputs_of(model, batch))
    model.delete_adapter("both")
    assert same(outputs_of(model, batch), outputs_of(lifecycle.base(architecture), batch))


def test_the_configuration_says_what_it_is_made_of(lifecycle: Lifecycle):
    model = with_two(lifecycle, "bert")
    config = combine_adapters(model, ["kind", "gender"], "both", sticky=True)
    assert config is model.peft_config["both"]
    parts = {name: model.peft_config[name] for name in ("kind", "gender")}
    assert (config.concept, config.labels, config.concept_dim, config.rank) == ("kind+gender", None, 5, 3)
    assert (config.fitted, config.sticky, config.affine, config.method, config.site) == (
        True,
        True,
        None,
        "leace",
        "output",
    )
    sites = parts["kind"].fitted_sites
    assert config.fitted_sites == {site: {"width": 32, "rank": 3} for site in sites}
    provenance = config.provenance
    assert provenance["examples"] == sum(part.provenance["examples"] for part in parts.values()) == 96
    assert provenance["fingerprint"] == parts["kind"].provenance["fingerprint"]
    assert provenance["leakage"] == {} and provenance["base_class"] == "BertModel"
    assert provenance["combined_from"]["kind"]["labels"] == ["a", "b", "c"]
    assert provenance["combined_from"]["gender"]["concept"] == "gender"
    # The configurations of the parts are not changed.
    assert [part.concept for part in parts.values()] == ["kind", "gender"]
    assert all(layer.adapters == ["gender", "kind", "both"] for layer in erasure_layers(model).values())


def test_the_order_of_the_names_does_not_matter(lifecycle: Lifecycle):
    models = [with_two(lifecycle, "bert") for _ in range(2)]
    combine_adapters(models[0], ["gender", "kind"], "both")
    combine_adapters(models[1], ["kind", "gender"], "both")
    assert same(*(outputs_of(model, small_batch("bert", seed=5)) for model in models))


def test_a_site_of_one_adapter_takes_its_eraser(lifecycle: Lifecycle):
    model = lifecycle.base("bert")
    places = [f"encoder.layer.{n}.output.LayerNorm" for n in range(2)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* switched the erasure")
        add(model, "gender", small_batches("bert"), target_modules=places)
        add(model, "kind", token_batches("bert"), target_modules=[places[1], "embeddings.LayerNorm"])
    config = combine_adapters(model, ["gender", "kind"], "both")
    assert {site: told["rank"] for site, told in config.fitted_sites.items()} == {
        "embeddings.LayerNorm": 2,
        places[0]: 1,
        places[1]: 3,
    }
    for name, site in (("gender", places[0]), ("kind", "embeddings.LayerNorm")):
        layer = erasure_layers(model, "both")[site]
        for mine, theirs in zip(layer.eraser_state("both"), layer.eraser_state(name), strict=True):
            assert torch.equal(mine, theirs)


def test_the_target_is_exactly_the_sites(lifecycle: Lifecycle):
    """`norm` at the end of a Llama must not stand for every norm."""
    model = lifecycle.base("llama")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* switched the erasure")
        add(model, "gender", small_batches("llama"), target_modules=r"model\.norm")
        add(model, "kind", token_batches("llama"), target_modules=r"model\.norm|model\.layers\.0\.mlp")
    config = combine_adapters(model, ["gender", "kind"], "both")
    assert list(erasure_layers(model, "both")) == list(config.fitted_sites) == ["model.layers.0.mlp", "model.norm"]
    names = [name for name, _ in model.named_modules() if "concept_erasure" not in name]
    targeted = [name for name in names if check_target_module_exists(config, name)]
    assert targeted == ["model.layers.0.mlp", "model.norm"]


def test_means_are_weighted_by_rows(lifecycle: Lifecycle):
    model = lifecycle.base("bert")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* switched the erasure")
        add(model, "gender", small_batches("bert", count=3), target_modules=[FIRST["bert"]])
        add(model, "kind", token_batches("bert", seed=300)[:1], target_modules=[FIRST["bert"]])
    combine_adapters(model, ["gender", "kind"], "both")
    mean, gender, kind = (eraser_of(model, name, FIRST["bert"]).bias for name in ("both", "gender", "kind"))
    torch.testing.assert_close(mean, 0.75 * gender + 0.25 * kind)


def test_linear_erasures_stay_linear(lifecycle: Lifecycle):
    model = with_two(lifecycle, "bert", affine=False)
    config = combine_adapters(model, ["gender", "kind"], "both")
    assert config.affine is False
    assert not any(bool(x.eraser_state("both")[2].any()) for x in erasure_layers(model).values())


def test_a_double_precision_model_keeps_double_precision(lifecycle: Lifecycle):
    model = lifecycle.base("bert").double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* switched the erasure")
        add(model, "gender", small_batches("bert"))
        add(model, "kind", token_batches("bert"))
    combine_adapters(model, ["gender", "kind"], "both")
    site = FIRST["bert"]
    parts = [eraser_of(model, name, site) for name in ("gender", "kind")]
    assert all(part.dtype == torch.float64 for part in erasure_layers(model)[site].eraser_state("both"))
    for part in parts:
        assert float((eraser_of(model, "both", site).matrix @ part.left).abs().max()) < 1e-10
    expected = combine_erasers(parts, [1, 1])
    torch.testing.assert_close(eraser_of(model, "both", site).matrix, expected.matrix, rtol=0, atol=1e-12)


def test_on_a_peft_model(lifecycle: Lifecycle, tmp_path: Path):
    """On a PeftModel the combined adapter acts only after `set_adapter`, as after PEFT's `add_weighted_adapter`."""
    bare, batch = with_two(lifecycle, "bert"), small_batch("bert", seed=5)
    for name in ("gender", "kind"):
        bare.set_adapter(name)
        bare.save_pretrained(tmp_path / name)
    model = peft.PeftModel.from_pretrained(lifecycle.base("bert"), tmp_path / "gender", adapter_name="gender")
    model.load_adapter(tmp_path / "kind", "kind")
    before = outputs_of(model, batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* switched ")
        config = combine_adapters(model, ["gender", "kind"], "both")
    assert model.peft_config["both"] is config
    assert model.active_adapters == ["gender"] and same(outputs_of(model, batch), before)
    model.set_adapter("both")
    combine_adapters(bare, ["gender", "kind"], "both")
    assert same(outputs_of(model, batch), outputs_of(bare, batch))
    model.save_pretrained(tmp_path / "all")
    again = peft.PeftModel.from_pretrained(lifecycle.base("bert"), tmp_path / "all" / "both")
    assert same(outputs_of(again, batch), outputs_of(bare, batch))


def test_a_trained_head_that_the_combined_adapter_lacks_is_named():
    base = hf.BertForSequenceClassification(small_model("bert").config)
    config = ConceptErasureConfig(labels=LABELS, target_modules=["query"], task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config, adapter_name="one")
    model.add_adapter("two", config)
    for name in ("one", "two"):
        model.set_adapter(name)
        fit_concept_erasure(model, small_batches("bert"), name, pool="cls", progress=False)
    without = r"is combined without the trained 'classifier' of 'two'"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=without)
        combine_adapters(model, ["one", "two"], "untrained")
    with torch.no_grad():
        base.classifier.modules_to_save["two"].weight.add_(1)
    with pytest.warns(UserWarning, match=without):
        combine_adapters(model, ["one", "two"], "both")


def test_a_peft_model_of_another_kind_says_where_to_combine(lifecycle: Lifecycle):
    bare, batch = with_two(lifecycle, "bert"), small_batch("bert", seed=5)
    expected = with_two(lifecycle, "bert")
    combine_adapters(expected, ["gender", "kind"], "both")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message=".* switched the erasure")
        model = peft.get_peft_model(bare, peft.LoraConfig(r=2, target_modules=["query"]), adapter_name="tuned")
        with pytest.raises(
            ValueError, match=r"takes LORA adapters only: call combine_adapters\(model.get_base_model\(\)"
        ):
            combine_adapters(model, ["gender", "kind"], "both")
        assert "both" not in model.peft_config
        combine_adapters(model.get_base_model(), ["gender", "kind"], "both")
    assert same(outputs_of(model, batch), outputs_of(expected, batch))


def test_who_goes_dark_is_said_of_others_only(lifecycle: Lifecycle):
    model = with_two(lifecycle, "bert", target_modules=[FIRST["bert"]])
    model.set_adapter(["gender", "kind"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        combine_adapters(model, ["gender", "kind"], "both")
    assert model.active_adapters() == ["both"]
    add(model, "other", token_batches("bert", seed=7), target_modules=[FIRST["bert"]])
    with pytest.warns(UserWarning, match=r"Adding 'again' switched the erasure 'other' off") as caught:
        combine_adapters(model, ["gender", "kind"], "again")
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.filterwarnings("default:'both' was combined from erasers:UserWarning")
def test_what_holds_of_deeper_sites_is_said(lifecycle: Lifecycle):
    model = with_two(lifecycle, "bert")
    with pytest.warns(UserWarning, match="exact at the sites whose input the other adapters do not change") as caught:
        combine_adapters(model, ["gender", "kind"], "both")
    assert caught[0].filename == __file__
    # At the last site a part of the concepts is indeed left.
    last = list(erasure_layers(model))[-1]
    seen = rows_at(model, [last], small_batches("bert"))[last]
    plain = rows_at(lifecycle.base("bert"), [last], small_batches("bert"))[last]
    assert max(correlation(seen, classes_of("bert", concept), plain) for concept in ("gender", "kind")) > 1e-3


def test_beside_other_adapters(lifecycle: Lifecycle):
    """A LoRA wraps the modules, and a feature changes their weights, but the combined erasures stay the same."""
    plain, beside = (with_two(lifecycle, "bert", target_modules=["query"]) for _ in range(2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* switched the")
        beside.add_adapter(gradiend_config(target_modules=["query"]), adapter_name="steering")
        beside.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]), adapter_name="tuned")
    for model in (plain, beside):
        combine_adapters(model, ["gender", "kind"], "both")
    batch = small_batch("bert", seed=5)
    assert same(outputs_of(beside, batch), outputs_of(plain, batch))
    assert plain.peft_config["both"].provenance == beside.peft_config["both"].provenance
    assert list(erasure_layers(beside, "both")) == list(erasure_layers(plain, "both"))


# ---- refusals --------------------------------------------------------------------------------------------------------


def refuse(model: nn.Module, names: object, into: str, message: str) -> None:
    before = state_of(model, "bert")
    with pytest.raises(ValueError, match=message):
        combine_adapters(model, names, into)
    before.assert_same(state_of(model, "bert"))


def test_refusals_leave_the_model_as_it_was(lifecycle: Lifecycle):
    model = with_two(lifecycle, "bert")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* switched the")
        unfitted = ConceptErasureConfig(labels=LABELS, target_modules=[FIRST["bert"]])
        model.add_adapter(unfitted, adapter_name="unfitted")
        model.add_adapter(gradiend_config(target_modules=["query"]), adapter_name="steering")
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]), adapter_name="tuned")
        add(model, "before", small_batches("bert"), target_modules=[FIRST["bert"]], site="input", labels=LABELS)
        add(model, "linear", small_batches("bert"), affine=False, labels=LABELS)
    for names in ([], ["gender"], "gender", ["gender", "gender"]):
        refuse(model, names, "both", "give the names of at least two adapters")
    refuse(model, ["gender", "kind", "gender"], "both", "give the names of at least two adapters, each once")
    refuse(model, ["gender", "kind"], "tuned", "into='tuned' is the name of an adapter that is there already")
    refuse(model, ["gender", "x"], "both", r"'x' is not a concept erasure .*; those here are \['gender', 'kind'")
    refuse(model, ["gender", "tuned"], "both", "'tuned' is not a concept erasure of this model .*, but a LORA adapter")
    refuse(model, ["gender", "steering"], "both", "'steering' is not a concept erasure .*, but a GRADIEND adapter")
    refuse(model, ["gender", "unfitted"], "both", "'unfitted' was never fitted. Call fit_concept_erasure")
    refuse(model, ["gender", "before"], "both", "differ in site, .*'before': 'input'.*: only erasers at the same side")
    refuse(model, ["gender", "linear"], "both", "some are linear: fit all of them with the same affine")
    refuse(model, ["gender", "kind"], "a.b", "becomes part of state-dict keys")
    erasure_layers(model)[FIRST["bert"]].await_values("kind")
    with pytest.raises(ValueError, match=r"The eraser of adapter 'kind' at .* is missing or not finite"):
        combine_adapters(model, ["gender", "kind"], "both")


def test_a_model_without_adapters():
    with pytest.raises(ValueError, match=r"'a' is not a concept erasure of this model .*; those here are none"):
        combine_adapters(nn.Linear(2, 2), ["a", "b"], "both")


def test_merged_adapters_are_refused(lifecycle: Lifecycle, tmp_path: Path):
    bare = with_two(lifecycle, "bert", target_modules=["query"])
    for name in ("gender", "kind"):
        bare.set_adapter(name)
        bare.save_pretrained(tmp_path / name)
    model = peft.PeftModel.from_pretrained(lifecycle.base("bert"), tmp_path / "gender", adapter_name="gender")
    model.load_adapter(tmp_path / "kind", "kind")
    model.merge_adapter(["gender"])
    refuse(model, ["gender", "kind"], "both", "'gender' is merged into the weights: call unmerge_adapter")
    model.unmerge_adapter()
    combine_adapters(model, ["gender", "kind"], "both")


def test_different_widths_at_one_site_are_refused(lifecycle: Lifecycle):
    model = with_two(lifecycle, "bert", target_modules=[FIRST["bert"]])
    layer = erasure_layers(model)[FIRST["bert"]]
    left, right, bias, readings = layer.state_of("kind")
    layer.restore_state("kind", (left[:16], right[:, :16], bias[:16], readings))
    with pytest.raises(
        ValueError, match=r"At 'encoder.*' \['gender', 'kind'\] cannot be combined: .* widths \[16, 32\]"
    ):
        combine_adapters(model, ["gender", "kind"], "both")
    assert "both" not in model.peft_config and layer.adapters == ["gender", "kind"]


# ---- fitted anew -----------------------------------------------------------------------------------------------------


def data_of(architecture: str) -> dict[str, list[dict[str, Tensor]]]:
    return {"gender": small_batches(architecture), "kind": token_batches(architecture)}


@both_architectures
@pytest.mark.parametrize("sequential", [True, False])
def test_fitted_anew_on_the_data_of_both(architecture: str, sequential: bool, lifecycle: Lifecycle):
    model = with_two(lifecycle, architecture)
    config = combine_adapters(
        model, ["gender", "kind"], "both", batches=data_of(architecture), sequential=sequential, progress=False
    )
    assert config.concept == "gender+kind" and set(config.provenance["combined_from"]) == {"gender", "kind"}
    sites, batches = list(erasure_layers(model)), small_batches(architecture)
    plain = rows_at(lifecycle.base(architecture), sites, batches)
    model.set_adapter("both")
    erased = rows_at(model, sites, batches)
    left = {
        site: max(correlation(erased[site], classes_of(architecture, c), plain[site]) for c in ("gender", "kind"))
        for site in sites
    }
    if sequential:
        # Every site was fitted on what reaches it, so that only float32 rounding is left of either concept.
        assert max(left.values()) < 1e-5
    else:
        # In one pass this holds only for the first site.
        assert left[FIRST[architecture]] < 1e-5 < max(left.values())


def test_fitted_anew_it_is_saved_and_loaded(lifecycle: Lifecycle, tmp_path: Path):
    model = with_two(lifecycle, "bert")
    combine_adapters(model, ["gender", "kind"], "both", batches=data_of("bert"), progress=False)
    model.set_adapter("both")
    model.save_pretrained(tmp_path)
    other = lifecycle.base("bert")
    other.load_adapter(str(tmp_path))
    assert same(outputs_of(other, small_batch("bert")), outputs_of(model, small_batch("bert")))


@pytest.mark.parametrize("sticky", [True, False])
def test_the_former_adapters_do_not_act_while_the_new_one_is_fitted(sticky: bool, lifecycle: Lifecycle):
    """The combined adapter must not be fitted on activations from which its concepts are erased already."""
    models = [with_two(lifecycle, "bert", sticky=sticky), with_two(lifecycle, "bert")]
    for model in models:
        combine_adapters(model, ["gender", "kind"], "both", batches=data_of("bert"), progress=False)
    site = FIRST["bert"]
    one, other = (eraser_of(model, "both", site) for model in models)
    assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batches": {"gender": []}}, r"batches are given for \['gender'\], but names=\['gender', 'kind'\]"),
        ({"background": []}, "background and resident_batches are for fitting anew"),
        ({"batches": {"gender": [], "kind": []}}, r"batches\['gender'\] is empty"),
        ({"batches": {"gender": [], "kind": []}, "pool": "max"}, "pool='max' is not known"),
        ({"batches": {"gender": [], "kind": []}, "resident_batches": 0}, "resident_batches=0: give at least 1"),
        ({"batches": {"gender": [], "kind": []}, "resident_batches": 1, "sequential": False}, "with sequential=True"),
    ],
)
def test_refused_batches_leave_the_model_as_it_was(options: dict, words: str, lifecycle: Lifecycle):
    model = with_two(lifecycle, "bert")
    before = state_of(model, "bert")
    with pytest.raises(ValueError, match=words):
        combine_adapters(model, ["gender", "kind"], "both", progress=False, **options)
    before.assert_same(state_of(model, "bert"))
