"""What a head predicts follows from transformers' tables, and two forward passes check that it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from hf_erasure.models.heads import check_next_word, known_task
from hf_erasure.models.slots import SlotInputs, SlotReader

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 16, "vocab_size": 60, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
BERT = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


def vision(model_type: str) -> dict[str, Any]:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return size | {"model_type": model_type, "image_size": 8, "patch_size": 4}


def llava() -> hf.PreTrainedModel:
    config = hf.LlavaConfig(
        text_config={"model_type": "llama"} | SMALL, vision_config=vision("clip_vision_model"), image_token_index=59
    )
    return hf.LlavaForConditionalGeneration(config).eval()


def xlnet() -> hf.PreTrainedModel:
    return hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=16)).eval()


def prophetnet() -> hf.PreTrainedModel:
    sides = {
        f"num_{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("attention_heads", 2), ("layers", 1))
    }
    config = hf.ProphetNetConfig(vocab_size=60, hidden_size=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sides)
    return hf.ProphetNetForConditionalGeneration(config).eval()


def filled(rows: int, length: int, *, decoder: bool = False) -> SlotInputs:
    """Inputs whose slot is the last position of each row."""
    ids = torch.randint(5, 50, (rows, length), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
        {"decoder_input_ids": ids} if decoder else {}
    )
    return SlotInputs(inputs, torch.arange(rows), torch.full((rows,), length - 1), torch.full((rows,), 7))


def test_a_language_model_with_a_tower_reads_texts_alone():
    model = llava()
    assert known_task(model) == "causal"
    check_next_word(model)
    batch = filled(3, 5)
    with torch.no_grad():
        torch.testing.assert_close(SlotReader(model).logits(batch), model(**batch.inputs).logits[:, -1])


@pytest.mark.parametrize("name", ["Qwen2AudioForConditionalGeneration", "Qwen2VLForConditionalGeneration"])
def test_towers_of_other_kinds_are_known_by_transformers_tables(name: str):
    kind = getattr(hf, name)
    with torch.device("meta"):
        assert known_task(kind(kind.config_class())) == "causal"


def test_one_class_for_words_that_are_hidden_and_for_the_next():
    for kind, config in (("Flaubert", hf.FlaubertConfig), ("XLM", hf.XLMConfig)):
        model = getattr(hf, f"{kind}WithLMHeadModel")(
            config(vocab_size=60, emb_dim=16, n_layers=1, n_heads=2, n_langs=1)
        )
        assert known_task(model) == "masked"
    assert known_task(hf.XLMWithLMHeadModel(hf.XLMConfig(emb_dim=16, n_layers=1, n_heads=2, causal=True))) == "causal"


def test_padding_in_a_models_own_inputs_does_not_matter():
    config = hf.BigBirdPegasusConfig(
        vocab_size=60, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        max_position_embeddings=32, attention_type="original_full",
    )  # fmt: skip
    check_next_word(hf.BigBirdPegasusForCausalLM(config).eval())


def bert(*, is_decoder: bool) -> hf.PreTrainedModel:
    return hf.BertLMHeadModel(hf.BertConfig(**BERT, is_decoder=is_decoder)).eval()


@pytest.mark.parametrize("model", [xlnet, lambda: bert(is_decoder=False)], ids=["xlnet", "bert both ways"])
def test_a_causal_head_on_attention_both_ways_is_refused(model: Any):
    with pytest.raises(ValueError, match="depend on the tokens after it"):
        check_next_word(model())


def test_bert_as_a_decoder_predicts_the_next_word():
    check_next_word(bert(is_decoder=True))


def test_a_head_that_needs_an_image_is_refused():
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = hf.BlipConfig(text_config=text | {"vocab_size": 60}, vision_config=vision("blip_vision_model"))
    with pytest.raises(ValueError, match="does not accept a text alone"):
        check_next_word(hf.BlipForConditionalGeneration(config).eval())


@pytest.mark.parametrize(("rows", "length"), [(3, 5), (1, 4), (1, 1)])
def test_a_head_that_reads_other_streams_than_the_last_hidden_state(rows: int, length: int):
    model, batch = prophetnet(), filled(rows, length, decoder=True)
    with torch.no_grad():
        found = SlotReader(model).logits(batch)
        torch.testing.assert_close(found, model(**batch.inputs).logits[:, -1])


def test_logits_for_other_positions_than_those_of_the_text_are_refused():
    model = llava()
    model.register_forward_hook(lambda _, args, out: {"logits": torch.cat([out.logits, out.logits], 1)})
    reader = SlotReader(model)
    reader._backbone = model
    with pytest.raises(ValueError, match="not known which logits belong to which token"):
        reader.logits(filled(2, 5))
