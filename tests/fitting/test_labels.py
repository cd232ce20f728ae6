"""How labels are assigned to activations: padding, pooling, decoders, heads and flattened tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.fitting.labels import BatchLabels, Source, mean_pooled
from hf_erasure.models.layout import Axes, Visit
from tests.small_models import ARCHITECTURES, LABELS

IDS = torch.tensor([[5, 6, 7, 0], [5, 0, 0, 0], [0, 0, 5, 6]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]])
# The axes of most modules, of a decoder, of a module with all tokens in one list, and of a module without positions.
AXES = {
    Visit("layer.0"): Axes(-1, 0, position=1, side=""),
    Visit("decoder.block.0"): Axes(-1, 0, position=1, side="decoder_"),
    Visit("experts"): Axes(-1, 0, per_example=4, side="", is_flat=True),
    Visit("pooler"): Axes(-1, 0),
}
STATES = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


def labels(concept: torch.Tensor, pool: str = "tokens", z_dim: int = 2, **inputs: torch.Tensor) -> BatchLabels:
    batch = {"input_ids": IDS, "attention_mask": MASK, "concept_labels": concept, **inputs}
    config = (
        ConceptErasureConfig(concept_dim=z_dim) if concept.is_floating_point() else ConceptErasureConfig(labels=LABELS)
    )
    return BatchLabels(batch, Source(config), pool, AXES)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("tokens", [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]]),
        ("mean", [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]]),
        ("cls", [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]),
        ("last", [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_sequence_labels_count_for_the_rows_of_the_pool(pool: str, expected: list[list[int]]) -> None:
    _, selection = labels(torch.tensor([0, 1, 1]), pool).select(STATES, Visit("layer.0"))
    assert selection.counted.int().tolist() == expected


def test_mean_pooling_gives_every_sequence_the_same_weight() -> None:
    _, selection = labels(torch.tensor([0, 1, 1]), "mean").select(STATES, Visit("layer.0"))
    assert selection.weight is not None
    torch.testing.assert_close(selection.weight.sum(1), torch.ones(3, dtype=torch.float64))


def test_a_sequence_labelled_ignore_does_not_count_but_is_real() -> None:
    _, selection = labels(torch.tensor([0, -100, 1])).select(STATES, Visit("layer.0"))
    assert selection.counted.int().tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert selection.real.equal(MASK.bool())


def test_token_labels_on_padding_do_not_count() -> None:
    every = torch.ones(3, 4, dtype=torch.long)
    _, selection = labels(every).select(STATES, Visit("layer.0"))
    assert selection.counted.equal(MASK.bool())


def test_continuous_labels_reach_every_token() -> None:
    values = torch.tensor([[0.5, 1.0], [2.0, 3.0], [4.0, 5.0]])
    _, selection = labels(values).select(STATES, Visit("layer.0"))
    assert selection.z is not None
    assert selection.z[2, 3].tolist() == [4.0, 5.0]


def test_flattened_tokens_are_put_back_in_rows() -> None:
    aligned, selection = labels(torch.tensor([0, 1, 1])).select(STATES.reshape(12, 8), Visit("experts"))
    assert aligned.equal(STATES)
    assert selection.counted.equal(MASK.bool())


def test_a_pooler_has_one_row_a_sequence() -> None:
    aligned, selection = labels(torch.tensor([0, 1, 1])).select(STATES[:, 0], Visit("pooler"))
    assert aligned.shape == (3, 1, 8)
    assert selection.counted.all()


def test_a_decoder_site_takes_the_decoder_mask() -> None:
    decoder = {
        "decoder_input_ids": torch.ones(3, 2, dtype=torch.long),
        "decoder_attention_mask": torch.tensor([[1, 1], [1, 0], [1, 1]]),
    }
    _, selection = labels(torch.tensor([0, 1, 1]), **decoder).select(torch.zeros(3, 2, 8), Visit("decoder.block.0"))
    assert selection.counted.int().tolist() == [[1, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("concept", "pool", "message"),
    [
        (torch.tensor([[0, 1, 1, 0]] * 3), "mean", "use pool='tokens'"),
        (torch.tensor([[[0]]]), "tokens", "are not class ids"),
        (torch.tensor([[0.0, 1.0, 2.0]] * 3), "tokens", r"\(batch, 2\)"),
        (torch.tensor([[0, 1]] * 3), "tokens", r"shape \(3, 2\) are not those of tokens: .*concept_labels.argmax\(1\)"),
        (torch.tensor([[0, 1]] * 3), "mean", r"concept_labels.argmax\(1\)"),
        (torch.tensor([[0], [1], [1]]), "tokens", r"shape \(3, 1\) are a column.*concept_labels.squeeze\(1\)"),
        (torch.tensor([[0], [1], [1]]), "mean", r"concept_labels.squeeze\(1\)"),
        (torch.tensor([0, 1, 2]), "mean", "hold the class id 2, and the adapter has 2 classes, 0 to 1"),
        (torch.tensor([0, 1, -1]), "mean", "hold the class id -1"),
        (torch.tensor([0, 1]), "mean", r"shape \(2,\) label 2 rows, and the batch has 3"),
    ],
)
def test_labels_that_do_not_fit_are_refused(concept: torch.Tensor, pool: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels(concept, pool).select(STATES, Visit("layer.0"))


def test_names_of_classes_instead_of_their_ids_are_refused() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, "concept_labels": ["female", "male", "male"]}
    with pytest.raises(TypeError, match="concept_labels are not numbers, the first is 'female'"):
        BatchLabels(batch, Source(ConceptErasureConfig(labels=LABELS)), "mean", AXES).select(STATES, Visit("layer.0"))
    model = ARCHITECTURES["bert"].build()
    model.add_adapter(ConceptErasureConfig(labels=LABELS))
    with pytest.raises(TypeError, match="concept_labels are not numbers, the first is 'female'"):
        fit_concept_erasure(model, [batch], progress=False)


def test_an_activation_of_other_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'layer\.0' has shape \(3, 7, 8\)"):
        labels(torch.tensor([0, 1, 1])).select(torch.zeros(3, 7, 8), Visit("layer.0"))


def test_a_batch_without_labels_says_what_is_missing() -> None:
    def read(*batches: Any) -> None:
        list(
            Source(ConceptErasureConfig(labels=LABELS), batches).read(
                "tokens", SimpleNamespace(of=lambda batch: AXES, frames_of=lambda batch: None)
            )
        )  # type: ignore[arg-type]

    whole = {"input_ids": IDS, "concept_labels": [0, 1, 1]}
    with pytest.raises(ValueError, match=r"batches\[2\] has no 'concept_labels', only \['input_ids'\]"):
        read(whole, whole, {"input_ids": IDS})
    for inputs in (IDS.numpy(), IDS.tolist()):
        with pytest.raises(TypeError, match=r"batches\[1\]\['input_ids'\] is of type .*write torch.as_tensor"):
            read(whole, whole | {"input_ids": inputs})
    with pytest.raises(TypeError, match="a batch is a dict"):
        read((IDS, MASK))


def test_mean_pooling_leaves_padding_out_whatever_it_holds() -> None:
    aligned, selection = labels(torch.tensor([0, -100, 1]), "mean").select(STATES, Visit("layer.0"))
    broken = torch.where(MASK.bool().unsqueeze(-1), aligned, torch.nan)
    pooled, rows = mean_pooled(broken, selection)
    torch.testing.assert_close(pooled[0, 0], STATES[0, :3].mean(0))
    torch.testing.assert_close(pooled[2, 0], STATES[2, 2:].mean(0))
    assert rows.counted.tolist() == [[True], [False], [True]]
