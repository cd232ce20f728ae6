"""All functions that take a model and a name find the adapter when the model is inside a wrapper."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from hf_erasure import (
    ConceptErasureConfig,
    GradiendAdapter,
    GradiendTrainer,
    combine_adapters,
    export_to_lora,
    fit_concept_erasure,
    verify_adapter,
)
from hf_erasure.adapters.common.config import ChildConfig
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.callbacks.gradiend import trained_weights
from hf_erasure.fitting.heldout import measured_leakage
from hf_erasure.models.model import bare_model
from tests.adapters.gradiend import lifecycle as gradiends
from tests.adapters.lifecycle import NAME, Cell, Lifecycle
from tests.fitting.gradiend.language_models import model_of, tokenizer_of
from tests.small_models import LABELS, inputs_of, outputs_of, same, small_batch, small_batches

NORMS, LINEAR = Cell("bert", "norms", "output"), Cell("bert", "all-linear", "output")


class Around(nn.Module):
    """A module of the user's own, whose inputs have other names than the model's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.encoder = inner

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.encoder(input_ids=ids, attention_mask=mask)


def below_a_head(model: Any) -> nn.Module:
    outer = hf.BertForSequenceClassification(model.config).eval()
    outer.bert = model
    return outer


def as_sentence_transformer(model: Any) -> nn.Module:
    package = pytest.importorskip("sentence_transformers")
    outer = package.SentenceTransformer(str(sentence_encoder()), device="cpu")
    outer[0].model = model
    return outer


@functools.cache
def sentence_encoder() -> Path:
    folder = Path(tempfile.mkdtemp())
    model_of("bert").bert.save_pretrained(folder)
    tokenizer_of("bert").save_pretrained(folder)
    return folder


def fsdp2(model: nn.Module) -> nn.Module:
    fully_shard(model)
    return model


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "bare": lambda model: model,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "FSDP2": fsdp2,
    "compiled": torch.compile,
    "own module": Around,
    "own module, compiled, DataParallel": lambda model: nn.DataParallel(torch.compile(Around(model))),
    "SentenceTransformer": as_sentence_transformer,
    "below a head": below_a_head,
}


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_erasure_is_found_inside(wrapper: str, lifecycle: Lifecycle):
    bare = lifecycle.fitted(NORMS)
    bare.requires_grad_(True)  # DDP needs a gradient to average
    model = WRAPPERS[wrapper](bare)
    found = adapter_of(model, NAME, ConceptErasureConfig)
    assert found.owner is bare and found.config is bare.peft_config[NAME]
    verified = verify_adapter(model, NAME)
    assert verified and "changes the output by" in str(verified)
    leakage = measured_leakage(model, small_batches("bert"), NAME)
    assert leakage == measured_leakage(lifecycle.fitted(NORMS), small_batches("bert"), NAME)
    bare.disable_adapters()
    assert "disabled" in str(verify_adapter(model, NAME))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_fitting_inside_gives_the_same_erasers(wrapper: str, lifecycle: Lifecycle):
    bare = lifecycle.base("bert")
    bare.add_adapter(ConceptErasureConfig(labels=LABELS), adapter_name=NAME)
    bare.requires_grad_(True)
    plain = lifecycle.base("bert")
    plain.add_adapter(ConceptErasureConfig(labels=LABELS), adapter_name=NAME)
    for model in (plain, WRAPPERS[wrapper](bare)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pool='tokens' guards")  # a head reads the first token
            fit_concept_erasure(model, small_batches("bert"), NAME, pool="tokens", progress=False)
    assert same(outputs_of(bare, small_batch("bert")), outputs_of(plain, small_batch("bert")))
    told = [model.peft_config[NAME].to_dict() for model in (bare, plain)]
    for config in told:
        config["provenance"].pop("reader")
    if wrapper == "FSDP":  # a process has only a part of each weight, which is not sampled
        assert told[0]["provenance"].pop("fingerprint") == {} != told[1]["provenance"].pop("fingerprint")
    assert told[0] == told[1]


@pytest.mark.parametrize("wrapper", ["DataParallel", "compiled", "own module", "SentenceTransformer", "below a head"])
def test_adapters_are_combined_and_exported_inside(wrapper: str, lifecycle: Lifecycle, tmp_path: Path):
    bare = lifecycle.fitted(LINEAR)
    bare.load_adapter(lifecycle.folder(LINEAR, "other", 200), adapter_name="other")
    model = WRAPPERS[wrapper](bare)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*combined from erasers")
        combine_adapters(model, [NAME, "other"], "both")
    assert verify_adapter(model, "both") and "both" in bare.peft_config
    export_to_lora(model, NAME, tmp_path)
    lora = peft.PeftModel.from_pretrained(lifecycle.base("bert"), tmp_path)
    bare.set_adapter(NAME)
    torch.testing.assert_close(outputs_of(lora, small_batch("bert")), outputs_of(bare, small_batch("bert")))


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name not in ("FSDP", "FSDP2", "below a head")])
def test_a_gradiend_adapter_is_found_inside(wrapper: str):
    bare, tokenizer = model_of("distilbert"), tokenizer_of("distilbert")
    bare.add_adapter(gradiends.config_of(keep_encoder=True), adapter_name="gender")
    gradiends.fit(bare, "gender")
    bare.requires_grad_(True)
    model = WRAPPERS[wrapper](bare)
    assert verify_adapter(model, "gender")
    inputs = tokenizer(["he went [MASK]", "she ran over"], return_tensors="pt", padding=True)
    batch = {**inputs, "labels": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)}
    assert torch.equal(
        GradiendAdapter.of(model, "gender").encode(batch), GradiendAdapter.of(bare, "gender").encode(batch)
    )
    GradiendAdapter.of(model, "gender").steer(learning_rate=0.02)
    assert bare.peft_config["gender"].learning_rate == 0.02
    assert [weight.name for weight in trained_weights(model, "gender")] == [
        weight.name for weight in trained_weights(bare, "gender")
    ]
    assert GradiendTrainer(model, tokenizer=tokenizer).adapter_name == "gender"


def test_a_gradiend_adapter_below_a_head_reads_through_the_head():
    model, tokenizer = model_of("bert_classifier").eval(), tokenizer_of("bert_classifier")
    model.bert.add_adapter(gradiends.config_of(keep_encoder=True, density=1.0), adapter_name="gender")
    feature = gradiends.fit(model.bert, "gender")
    assert verify_adapter(model, "gender") and verify_adapter(model.bert, "gender")
    batch = {**tokenizer(["he went home"], return_tensors="pt"), "labels": torch.tensor([1])}
    adapter = GradiendAdapter.of(model, "gender")
    value = adapter.encode(batch)
    adapter.steer(learning_rate=0.0)
    model.requires_grad_(True)(**batch).loss.backward()
    gradients = {name: model.bert.get_parameter(name).grad for name in feature.decoder.shapes}
    assert float(value) == pytest.approx(adapter.encoders()[("female", "male")](gradients), abs=1e-5)


def test_a_peft_model_inside_stays_what_adapters_are_added_to(lifecycle: Lifecycle):
    inner = peft.PeftModel.from_pretrained(lifecycle.base("bert"), lifecycle.folder(LINEAR), adapter_name=NAME)
    inner.load_adapter(lifecycle.folder(LINEAR, "other", 200), "other")
    model = nn.DataParallel(inner)
    assert adapter_of(model, NAME, ChildConfig).holder is inner
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*combined from erasers")
        combine_adapters(model, [NAME, "other"], "both")
    inner.set_adapter("both")
    assert verify_adapter(model, "both")


def test_where_several_fit_their_paths_are_named(lifecycle: Lifecycle):
    both = nn.ModuleDict({"left": Around(lifecycle.fitted(NORMS)), "right": lifecycle.fitted(NORMS)})
    for call in (
        lambda: verify_adapter(both, NAME),
        lambda: fit_concept_erasure(both, small_batches("bert"), NAME, progress=False),
    ):
        with pytest.raises(ValueError, match=r"fits 2 models .*: model\.left\.encoder, model\.right\. Pass the one"):
            call()
    assert verify_adapter(both.left, NAME)
    listed = nn.Sequential(lifecycle.fitted(NORMS), lifecycle.fitted(NORMS))
    with pytest.raises(ValueError, match=r"model\.get_submodule\('0'\), model\.get_submodule\('1'\)"):
        verify_adapter(listed, NAME)


def test_another_kind_is_named_with_the_remedy(lifecycle: Lifecycle, tmp_path: Path):
    model = Around(lifecycle.fitted(NORMS))
    with pytest.raises(
        ValueError, match=rf"'{NAME}' is not a GRADIEND adapter .*CONCEPT_ERASURE adapter.*GradiendConfig\("
    ):
        GradiendAdapter.of(model, NAME)
    model.encoder.add_adapter(peft.LoraConfig(target_modules=["query"]), adapter_name="tuned")
    for call in (
        lambda name: export_to_lora(model, name, tmp_path / "lora"),
        lambda name: fit_concept_erasure(model, small_batches("bert"), name, progress=False),
        lambda name: combine_adapters(model, [NAME, name], "both"),
    ):
        with pytest.raises(
            ValueError, match=r"'tuned' is not an? .*, but a LORA adapter; those here are \['no_gender'\]"
        ):
            call("tuned")
    assert "but a LORA adapter" in str(verify_adapter(model, "tuned"))


def test_a_batch_goes_through_the_module_that_takes_it(lifecycle: Lifecycle):
    model = Around(lifecycle.fitted(NORMS))
    batch = inputs_of(small_batch("bert"))
    own = {"ids": batch["input_ids"], "mask": batch["attention_mask"]}
    assert str(verify_adapter(model, NAME, own)) == str(verify_adapter(model, NAME, batch))
    assert str(verify_adapter(model.encoder, NAME, batch)) == str(verify_adapter(model, NAME, batch))


def test_what_is_called_the_bare_model(lifecycle: Lifecycle):
    bare = lifecycle.base("bert")
    assert bare_model(peft.get_peft_model(bare, peft.LoraConfig(target_modules=["query"]))) is bare
    assert bare_model(nn.DataParallel(Around(bare))) is bare
    two = nn.ModuleDict({"left": bare, "right": lifecycle.base("bert")})
    assert bare_model(two) is two
    assert bare_model(plain := nn.Linear(2, 2)) is plain
