"""Which rows are labelled and erased where activations are not (batch, position, width); measured by hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from torch import Tensor, nn

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.fitting.layouts import Layouts
from hf_erasure.models.model import Runner

LABELS = ["a", "b"]
TEXT = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
# The rounding of float32 sums over some hundreds of rows, as a share of |x| |z|.
ROUNDING = 1e-5


def texts(rows: int = 16, length: int = 8, seed: int = 0) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 2
    ids = torch.randint(4, 30, (rows, length), generator=noise) + 30 * labels[:, None]
    lengths = torch.randint(max(1, length // 2), length + 1, (rows, 1), generator=noise)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "concept_labels": labels}


def images(rows: int = 64) -> dict[str, Tensor]:
    """Images whose class shows in a cast of colour."""
    labels, noise = torch.arange(rows) % 2, torch.Generator().manual_seed(0)
    cast = labels.view(-1, 1, 1, 1) * torch.tensor([1.0, -1.0, 0.5]).view(3, 1, 1)
    return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=noise) + cast, "concept_labels": labels}


def left(rows: Tensor, labels: Tensor) -> float:
    """The covariance of rows with the label, as a share of `|x| |z|`."""
    x, z = rows.double() - rows.double().mean(0), labels.double() - labels.double().mean()
    return float((x.T @ z).norm() / (x.norm() * z.norm()))


def seen_at(model: nn.Module, site: str, batch: dict[str, Any]) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(site).register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(**{name: value for name, value in batch.items() if name != "concept_labels"})
    handle.remove()
    return found[0]


@pytest.mark.parametrize("length", [8, 16])
def test_positions_before_the_batch_as_many_as_there_are_rows(length: int) -> None:
    torch.manual_seed(0)
    model = hf.XLNetModel(hf.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=32)).eval()
    batch = texts(16, length)
    model.add_adapter(ConceptErasureConfig(labels=LABELS), adapter_name="e")
    fit_concept_erasure(model, [batch], "e", progress=False)
    hidden, real = seen_at(model, "layer.0.ff.layer_norm", batch), batch["attention_mask"].bool()
    labels = batch["concept_labels"][:, None].expand(real.shape)
    assert left(hidden.transpose(0, 1)[real], labels[real]) < ROUNDING


def test_rows_with_adapters_of_their_own_where_positions_come_first() -> None:
    torch.manual_seed(0)
    base = hf.XLNetModel(hf.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=32))
    model = get_peft_model(base, ConceptErasureConfig(labels=LABELS)).eval()
    batch = texts(16, 16)
    fit_concept_erasure(model, [batch], progress=False)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        erased = model(**inputs).last_hidden_state
        mixed = model(**inputs, adapter_names=["default", "__base__"] * 8).last_hidden_state
        with model.disable_adapter():
            plain = model(**inputs).last_hidden_state
    assert torch.allclose(mixed[::2], erased[::2], atol=1e-5)  # float32 sums in another order
    assert torch.equal(mixed[1::2], plain[1::2])
    with pytest.raises(ValueError, match="has activations of shape"):
        erasure_layers(model)["layer.0.ff.layer_norm"].erasures["default"].axis = 9
        model(**inputs)


def by_token(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"concept_labels": (batch["input_ids"] % 2).masked_fill(batch["attention_mask"] == 0, -100)}


def fitted_on_tokens(model: nn.Module, site: str, batches: list[dict[str, Any]], start: int = 0) -> int:
    """Fit, and check that nothing is left at the tokens; returns the number of rows that were fitted on."""
    model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=[site]), adapter_name="e")
    report = fit_concept_erasure(model, batches, "e", progress=False)
    rows, labels = [], []
    for batch in batches:
        real, label = batch["attention_mask"].bool(), batch["concept_labels"]
        rows.append(seen_at(model, site, batch)[:, start : start + real.shape[1]][real])
        labels.append((label if label.dim() > 1 else label[:, None].expand(real.shape))[real])
    assert left(torch.cat(rows), torch.cat(labels)) < ROUNDING
    return report.sites[0].rows


@pytest.mark.parametrize("of_tokens", [False, True], ids=["sequences", "tokens"])
@pytest.mark.parametrize("lengths", [(8,), (7,), (9, 8)], ids=["a multiple", "no multiple", "both"])
def test_padding_to_multiples_of_the_models_window_does_not_count(lengths: tuple[int, ...], of_tokens: bool) -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "attention_window": 4, "max_position_embeddings": 66, "pad_token_id": 0}
    model = hf.LongformerModel(hf.LongformerConfig(**TEXT, **sizes)).eval()
    batches = [texts(length=length, seed=length) for length in lengths]
    batches = [by_token(batch) for batch in batches] if of_tokens else batches
    counted = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert fitted_on_tokens(model, "encoder.layer.0.output.LayerNorm", batches) == counted


class Prompted(hf.PreTrainedModel):
    """Puts three states before those of the tokens, and adds the tokens' mean; or makes more rows, by the ids."""

    config_class = hf.BertConfig

    def __init__(self, hops: bool = False) -> None:
        super().__init__(hf.BertConfig(**TEXT))
        self.prompt, self.hops = nn.Parameter(torch.randn(3, 16)), hops
        self.table, self.norm = nn.Embedding(64, 16), nn.LayerNorm(16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.table(input_ids)
        if self.hops:  # Each token gives one to three frames, by its id, and shorter texts are padded.
            counts = (input_ids % 3 + 1) * attention_mask
            frames = [state.repeat_interleave(count, 0) for state, count in zip(states, counts, strict=True)]
            return self.norm(nn.utils.rnn.pad_sequence(frames, batch_first=True))
        mean = (states * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        states = torch.cat([self.prompt.expand(len(states), -1, -1), states], 1)
        return self.norm(states + mean[:, None])


@pytest.mark.parametrize("of_tokens", [False, True], ids=["sequences", "tokens"])
def test_a_prompt_in_front_counts_for_sequences_and_not_for_tokens(of_tokens: bool) -> None:
    torch.manual_seed(0)
    batch = by_token(texts()) if of_tokens else texts()
    model, tokens = Prompted().eval(), int(batch["attention_mask"].sum())
    if of_tokens:
        assert fitted_on_tokens(model, "norm", [batch], start=3) == tokens
        return
    model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=["norm"]), adapter_name="e")
    assert fit_concept_erasure(model, [batch], "e", progress=False).sites[0].rows == tokens + 3 * len(
        batch["input_ids"]
    )


def test_as_many_rows_as_the_content_has_it_are_refused() -> None:
    torch.manual_seed(0)
    model = Prompted(hops=True).eval()
    model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=["norm"]), adapter_name="e")
    with pytest.raises(ValueError, match="depends on its content, and which of them are padding"):
        fit_concept_erasure(model, [texts()], "e", progress=False)


class Pictures(nn.Module):
    """The channels come before the pixels, and are as many as a picture is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(pixel_values)).relu().mean((-1, -2)))


@pytest.mark.parametrize("site", ["conv", "norm"])
def test_channels_are_erased_and_not_the_columns_of_a_picture(site: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Pictures(), ConceptErasureConfig(labels=LABELS, target_modules=[site])).eval()
    batch = images()
    for _ in range(2):  # the second fit finds an eraser that mixes channels
        fit_concept_erasure(model, [batch], progress=False)
        assert model.peft_config["default"].fitted_sites == {site: {"width": 8, "rank": 1, "axis": 1}}
        hidden = seen_at(model.get_base_model(), site, batch).movedim(1, -1)
        labels = batch["concept_labels"].view(-1, 1, 1).expand(hidden.shape[:-1])
        assert left(hidden.flatten(0, 2), labels.flatten()) < ROUNDING
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(pixel_values=batch["pixel_values"]), model(pixel_values=batch["pixel_values"]))
    with torch.no_grad():
        erased = model(pixel_values=batch["pixel_values"])
        if site == "norm":
            with pytest.raises(ValueError, match="cannot be merged"):
                model.merge_and_unload()
        else:
            merged = model.merge_and_unload()(pixel_values=batch["pixel_values"])
            assert torch.allclose(merged, erased, atol=1e-5)  # float32 sums in another order


INPUTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "the channels of a convolution": (lambda: Pictures().eval(), {"width": 3, "rank": 1, "axis": 1}),
    "the width of a linear layer over patches": (
        lambda: hf.ViTModel(hf.ViTConfig(**{**TEXT, "num_hidden_layers": 1, "image_size": 8, "patch_size": 2})).eval(),
        {"width": 16, "rank": 1},
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_features_of_what_a_module_takes(name: str) -> None:
    make, expected = INPUTS[name]
    torch.manual_seed(0)
    base = make()
    wanted = (nn.Conv2d,) if "axis" in expected else (nn.Linear,)
    site = next(name for name, module in base.named_modules() if isinstance(module, wanted))
    model = get_peft_model(base, ConceptErasureConfig(labels=LABELS, target_modules=[site], site="input")).eval()
    fit_concept_erasure(model, [images()], progress=False)
    assert model.peft_config["default"].fitted_sites == {site: expected}


def test_random_numbers_and_what_is_not_a_tensor_are_left_as_they_are() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(64, 8), nn.LayerNorm(8)
            self.calls: list[int] = []

        def forward(self, input_ids: Tensor, attention_mask: Tensor, names: list[str]) -> Tensor:
            self.calls.append(len(names) - len(input_ids))
            return self.norm(self.table(input_ids)) + 1e-6 * torch.rand(1)

    torch.manual_seed(0)
    model = get_peft_model(Noisy(), ConceptErasureConfig(labels=LABELS, target_modules=["norm"])).eval()
    before, batch = torch.get_rng_state(), {**texts(), "names": ["name"] * 16}
    Layouts(Runner(model), erasure_layers(model), "default").of(batch)
    assert torch.equal(torch.get_rng_state(), before)
    fit_concept_erasure(model, [batch], progress=False)
    assert set(model.get_base_model().calls) == {0}
