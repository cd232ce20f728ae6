"""Tests of the tools in this folder: the measures find faults, and the list of sites shows all names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.breadth import kinds, truth, zoo
from tests.breadth.erasure import RESIDUAL
from tests.breadth.outcomes import FAILS, NOT_REACHED, PASS, REFUSED, WRONG, Outcomes, WrongError, different, same
from tests.breadth.sites import collapsed


class Turned(nn.Module):
    """Calls its site twice with (position, batch, width), the first time without the concept at real positions."""

    main_input_name = "input_ids"

    def __init__(self, erase_padding: bool) -> None:
        super().__init__()
        self.site, self.erase_padding = nn.Identity(), erase_padding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        concept = (input_ids[:, :1] >= 60).float().expand(input_ids.shape)
        kept = concept if self.erase_padding else concept * (1 - attention_mask)
        free = torch.stack([torch.arange(input_ids.shape[1]).float().expand(input_ids.shape), kept], -1)
        self.site(free.transpose(0, 1))
        return self.site(torch.stack([free[..., 0], concept], -1).transpose(0, 1))


def _batch() -> dict[str, Tensor]:
    labels = torch.arange(4) % 2
    mask = (torch.arange(5) < torch.tensor([5, 5, 3, 3])[:, None]).long()
    return {"input_ids": (10 + 60 * labels)[:, None] * mask, "attention_mask": mask, "concept_labels": labels}


def test_the_concept_is_found_at_the_visit_that_has_it_and_not_in_padding():
    found = truth.residuals(Turned(erase_padding=False), ["site"], [_batch()], {"site": -1})
    assert found["site", 0] < RESIDUAL
    assert found["site", 1] > 0.1
    assert truth.worst(found)[0] == "site, visit 2"
    leaking = truth.residuals(Turned(erase_padding=True), ["site"], [_batch()], {"site": -1})
    assert leaking["site", 0] > 0.1


def test_an_output_of_another_length_is_another_output():
    short, long = {"waveform": torch.ones(1, 8)}, {"waveform": torch.ones(1, 9)}
    different(short, long, "erased")
    with pytest.raises(WrongError, match="loaded: the outputs differ by inf"):
        same(short, long, "loaded")
    with pytest.raises(WrongError, match="other parts"):
        different(short, {"spectrogram": torch.ones(1, 8)}, "erased")


def test_where_a_head_reads_the_first_token_no_other_counts():
    batch = _batch()
    batch["input_ids"][:, 0] = 5  # the same in both classes
    found = truth.residuals(_Read(), ["site"], [batch], {"site": -1}, "cls")
    assert found["site", 0] < RESIDUAL
    assert truth.residuals(_Read(), ["site"], [batch], {"site": -1})["site", 0] > 0.1


class _Read(nn.Module):
    """Returns its input ids as one feature."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.site(input_ids[..., None].float())


def test_blocks_of_convolutions_have_their_features_first():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 3, 1), nn.LayerNorm(3)

        def forward(self, input_values: Tensor) -> Tensor:
            return self.norm(self.conv(input_values).transpose(1, 2)).transpose(1, 2)

    class Model(nn.Module):
        main_input_name = "input_values"

        def __init__(self) -> None:
            super().__init__()
            self.layers, self.proj = nn.ModuleList([Layer()]), nn.Linear(7, 7)

        def forward(self, input_values: Tensor) -> Tensor:
            return self.proj(self.layers[0](input_values))

    batch = {"input_values": torch.randn(2, 3, 7), "concept_labels": torch.arange(2)}
    assert truth.feature_axes(Model(), ["layers.0", "proj"], batch) == {"layers.0": 1, "proj": -1}


def test_names_that_differ_in_numbers_are_one_line():
    names = [f"layer.{i}.{norm}" for i in range(2) for norm in ("before", "after")]
    assert collapsed([*names, "norm"]) == ["layer.{0,1}.before", "layer.{0,1}.after", "norm"]
    uneven = ["stages.0.layers.0.norm", "stages.1.layers.0.norm", "stages.1.layers.1.norm"]
    assert collapsed(uneven) == ["stages.0.layers.0.norm", "stages.1.layers.{0,1}.norm"]


def test_outcomes():
    def wrong() -> None:
        raise WrongError("it leaks")

    outcomes = Outcomes()
    outcomes.step("one", lambda: None)
    outcomes.step("two", wrong)
    outcomes.step("three", lambda: [][0])
    outcomes.step("four", lambda: None, "three")
    assert outcomes.of == {"one": PASS, "two": WRONG, "three": FAILS, "four": NOT_REACHED}
    assert outcomes.together("both", "one", "two") == WRONG
    assert outcomes.reasons["both"] == "it leaks"
    assert REFUSED not in outcomes.of.values()


def test_the_types_that_are_always_built_are_types():
    for chosen in (kinds.TEXTS, kinds.MEDIA, kinds.GRADIEND):
        names = kinds.chosen(chosen)
        assert len(names) == len(set(names))
        assert set(names) <= set(zoo.TYPES)
