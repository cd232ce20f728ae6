"""Which positions of the last hidden state a head reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.fitting.layouts import Layouts, few_rows
from hf_erasure.fitting.sites import pool_for
from hf_erasure.models.model import Runner
from hf_erasure.models.pooling import pooled
from tests.breadth.zoo import build
from tests.small_models import _GROUPED, _SIZES, _TEXT, _TOKENS, VOCABULARY, WIDTH, roughen

EOS = 2
GPT2 = {**_TOKENS, "n_embd": WIDTH, "n_layer": 1, "n_head": 4, "n_inner": 64, "n_positions": 48}
T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": EOS, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    **_TOKENS, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 48,
    "decoder_start_token_id": EOS,
}  # fmt: skip
IMAGE = {**_SIZES, "image_size": 16, "patch_size": 4, "num_labels": 3}
SWIN = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}

TEXTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**_TEXT)), "cls"),
    "roberta": (lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_TEXT)), "cls"),
    "gpt2": (lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2)), "last"),
    "llama": (lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_GROUPED)), "last"),
    "t5": (lambda: hf.T5ForSequenceClassification(hf.T5Config(**T5)), "last"),
    "bart": (lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART)), "last"),
    # The blocks of these run without gradients, or are called past their hooks.
    "reformer": (lambda: build("reformer", hf.AutoModelForSequenceClassification), "cls"),
    "squeezebert": (lambda: build("squeezebert", hf.AutoModelForSequenceClassification), "cls"),
    "bert tokens": (lambda: hf.BertForTokenClassification(hf.BertConfig(**_TEXT)), "tokens"),
    "bert masked": (lambda: hf.BertForMaskedLM(hf.BertConfig(**_TEXT)), "tokens"),
    "llama causal": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)), "tokens"),
    "modernbert mean": (
        lambda: hf.ModernBertForSequenceClassification(
            hf.ModernBertConfig(**_TEXT, cls_token_id=1, sep_token_id=2, classifier_pooling="mean")
        ),
        "mean",
    ),
}
IMAGES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)), "cls", "the first token"),
    "beit": (lambda: hf.BeitForImageClassification(hf.BeitConfig(**IMAGE)), "mean", "mean of the tokens behind"),
    "swin": (lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN)), "mean", "the mean of the tokens"),
}


def text_batch(*, left: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (3, 8), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((8, 3, 5)):
        mask[row, slice(0, 8 - length) if left else slice(length, 8)] = 0
        ids[row, 7 if left else length - 1] = EOS
    return {"input_ids": ids * mask, "attention_mask": mask, "concept_labels": torch.tensor([0, 1, 0])}


def image_batch() -> dict[str, Tensor]:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "concept_labels": torch.tensor([0, 1, 0])}


def found(model: nn.Module, batch: dict[str, Tensor], pool: str | None = None) -> tuple[str, str]:
    roughen(model, torch.Generator().manual_seed(0)).eval()
    config = ConceptErasureConfig(labels=["a", "b"])
    return pool_for(pool, model, Layouts(Runner(model), {}, "default"), config, few_rows(batch))


def _with_adapter(model: Any) -> Any:
    roughen(model, torch.Generator().manual_seed(0)).eval()
    model.add_adapter(ConceptErasureConfig(labels=["a", "b"]))
    return model


@pytest.mark.filterwarnings("error:pool")
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_head_s_positions_are_found(name: str, left: bool) -> None:
    build, pool = TEXTS[name]
    if left and pool == "cls":
        with pytest.warns(UserWarning, match=r"reads positions \[0\] of 8, padding among them"):
            assert found(build(), text_batch(left=True))[0] == "tokens"
    else:
        assert found(build(), text_batch(left=left))[0] == pool


def test_a_head_that_reads_the_first_token_beside_the_mean_of_the_others_warns() -> None:
    """No pool guards both: where every token counts alike, the parts may show the concept with opposite signs."""
    with pytest.warns(UserWarning, match="the first token, and the mean of the tokens behind it, so that all tokens"):
        guarded, _ = found(hf.Dinov2ForImageClassification(hf.Dinov2Config(**IMAGE)), image_batch())
    assert guarded == "tokens"


def clip() -> nn.Module:
    text = {**_TEXT, "eos_token_id": 3, "max_position_embeddings": 8}  # CLIP takes 2 for another rule
    return hf.CLIPModel(hf.CLIPConfig(text_config=text | {"bos_token_id": 1}, vision_config=IMAGE, projection_dim=8))


CLIP_TEXTS = text_batch()
CLIP_TEXTS["input_ids"][CLIP_TEXTS["input_ids"] == EOS] = 3


@pytest.mark.filterwarnings("error:pool")
@pytest.mark.parametrize(
    ("batch", "pool", "method"),
    [(CLIP_TEXTS, "last", "get_text_features"), (image_batch(), "cls", "get_image_features")],
    ids=["texts", "images"],
)
def test_what_pools_a_tower_is_its_head(batch: dict[str, Tensor], pool: str, method: str) -> None:
    """Otherwise the features of CLIP keep the concept: nobody reads all of its tokens."""
    guarded, reader = found(clip(), batch)
    assert guarded == pool and reader.startswith(f"CLIPModel.{method} reads")


def test_towers_that_are_pooled_in_different_ways_warn() -> None:
    batch = CLIP_TEXTS | image_batch()
    with pytest.warns(UserWarning, match="reads the last real token, and CLIPModel.get_image_features reads the first"):
        assert found(clip(), batch)[0] == "tokens"
    fitted = fit_concept_erasure(model := _with_adapter(clip()), [CLIP_TEXTS] * 4, progress=False)
    assert fitted.pool == "last"
    batch = {name: value for name, value in CLIP_TEXTS.items() if name != "concept_labels"}
    with torch.no_grad():
        features: Any = model.get_text_features(**batch)
    features, classes = features.pooler_output, CLIP_TEXTS["concept_labels"] == 1
    assert torch.allclose(features[classes].mean(0), features[~classes].mean(0), atol=1e-4 * float(features.std()))


@pytest.mark.filterwarnings("error:pool")
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_head_s_positions_are_found(name: str) -> None:
    build, pool, words = IMAGES[name]
    guarded, reader = found(build(), image_batch())
    assert guarded == pool and words in reader


def test_frozen_half_precision_weights_are_read_too_and_stay_as_they_were() -> None:
    model = hf.BertForSequenceClassification(hf.BertConfig(**_TEXT)).to(torch.bfloat16).requires_grad_(False).train()
    with torch.inference_mode():
        guarded, _ = pool_for(
            None,
            model,
            Layouts(Runner(model, []), {}, "default"),
            ConceptErasureConfig(labels=["a", "b"]),
            few_rows(text_batch()),
        )
    assert guarded == "cls" and model.training
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("error:pool")
def test_a_bare_model_has_no_reader_and_any_pool_is_taken() -> None:
    model = hf.BertModel(hf.BertConfig(**_TEXT))
    assert found(model, text_batch()) == ("tokens", "BertModel has no head that reads: all tokens count alike")
    assert found(model, text_batch(), "mean") == ("mean", "BertModel has no head that reads")


@pytest.mark.parametrize(("pool", "warns"), [("cls", False), ("mean", True), ("last", True), ("tokens", True)])
def test_a_pool_that_the_head_does_not_read_warns_and_names_both(pool: str, warns: bool) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert found(hf.BertForSequenceClassification(hf.BertConfig(**_TEXT)), text_batch(), pool)[0] == pool
    texts = [str(warning.message) for warning in seen if "pool=" in str(warning.message)]
    assert len(texts) == warns and all(f"pool={pool!r}" in text and "pool='cls'" in text for text in texts)


@pytest.mark.filterwarnings("error:pool")
def test_a_language_model_reads_its_first_and_its_last_token_among_the_others() -> None:
    for pool in ("cls", "last"):
        assert found(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), text_batch(), pool)[0] == pool


def test_labels_of_tokens_need_no_reader() -> None:
    batch = text_batch()
    batch["concept_labels"] = torch.zeros_like(batch["input_ids"])
    guarded = found(hf.BertForSequenceClassification(hf.BertConfig(**_TEXT)), batch)
    assert guarded == ("tokens", "the labels are of single tokens")


def test_a_head_that_fails_on_the_rows_is_said_to_be_unknown() -> None:
    model = hf.BertForSequenceClassification(hf.BertConfig(**_TEXT))
    model.classifier = nn.Linear(WIDTH + 1, 2)
    with pytest.warns(UserWarning, match="what BertForSequenceClassification reads could not be found out"):
        assert found(model, text_batch())[0] == "tokens"


def test_a_sentence_encoder_s_pooling_module_is_asked() -> None:
    models = pytest.importorskip("sentence_transformers").sentence_transformer.modules

    class Encoder(nn.Sequential):
        config: Any = None

    for mode, pool in (("cls", "cls"), ("mean", "mean"), ("lasttoken", "last")):
        bare = hf.BertModel(hf.BertConfig(**_TEXT))
        encoder = Encoder(bare, models.Pooling(WIDTH, pooling_mode=mode))
        config = ConceptErasureConfig(labels=["a", "b"])
        assert (
            pool_for(None, encoder, Layouts(Runner(bare, []), {}, "default"), config, few_rows(text_batch()))[0] == pool
        )
    with pytest.warns(UserWarning, match="its pooling module reads 'max'"):
        encoder = Encoder(bare, models.Pooling(WIDTH, pooling_mode="max"))
        pool_for(None, encoder, Layouts(Runner(bare, []), {}, "default"), config, few_rows(text_batch()))
    with pytest.warns(UserWarning, match="pool='mean' guards .*, but its pooling module reads 'max': what the head"):
        pool_for("mean", encoder, Layouts(Runner(bare, []), {}, "default"), config, few_rows(text_batch()))


def test_a_pool_beside_a_head_that_reads_padding_warns() -> None:
    with pytest.warns(
        UserWarning, match=r"pool='cls' guards the first token, but .* reads positions \[0\] of 8, padding"
    ):
        found(hf.BertForSequenceClassification(hf.BertConfig(**_TEXT)), text_batch(left=True), "cls")


@pytest.mark.parametrize("left", [False, True])
def test_pooled_vectors_are_those_of_a_loop(left: bool) -> None:
    mask = text_batch(left=left)["attention_mask"].bool()
    states = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(1))
    states[~mask] = float("nan")
    for pool, pick in {
        "mean": lambda rows: rows.mean(0),
        "cls": lambda rows: rows[0],
        "last": lambda rows: rows[-1],
    }.items():
        expected = torch.stack([pick(state[real]) for state, real in zip(states, mask, strict=True)])
        torch.testing.assert_close(pooled(states, mask, pool), expected)


def test_a_classifier_that_makes_its_decoder_s_inputs_is_fitted() -> None:
    model = roughen(hf.T5ForSequenceClassification(hf.T5Config(**T5)), torch.Generator().manual_seed(0)).eval()
    model.add_adapter(ConceptErasureConfig(labels=["a", "b"]), adapter_name="erasure")
    report = fit_concept_erasure(model, [text_batch()], "erasure", progress=False)
    assert report.pool == "last" and any(line.site.startswith("transformer.decoder") for line in report.sites)


class Around(nn.Module):
    """A user's own classifier around a bare encoder."""

    def __init__(self, reads: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bert = hf.BertModel(hf.BertConfig(**_TEXT))
        self.head, self.reads = nn.Linear(WIDTH, 2), reads

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.reads(self.bert(input_ids, attention_mask).last_hidden_state))


@pytest.mark.filterwarnings("error:pool")
def test_the_head_of_a_module_around_a_bare_model_is_asked() -> None:
    assert found(Around(lambda states: states[:, 0]), text_batch())[0] == "cls"
    guarded = found(Around(lambda states: states.mean(1)), text_batch())
    assert guarded == ("mean", "Around reads the mean of the tokens, padding included")
    assert found(Around(lambda states: states), text_batch())[0] == "tokens"
    assert found(nn.DataParallel(Around(lambda states: states[:, 0])), text_batch())[0] == "cls"
