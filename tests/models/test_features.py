"""The axis of the features follows from the modules that read or make an activation, and never from sizes alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_erasure.models.graph import Graph
from hf_erasure.models.layout import feature_axis


def axis_of(module: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        graph = Graph(module, lambda: module(x))
        shape = tuple(module(x).shape)
    return feature_axis([shape, (2 * len(x), *shape[1:])], "here", module, lambda: graph.features_at(module, "output"))


def test_channels_are_the_features_of_convolutions_though_the_picture_is_as_wide() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert axis_of(nn.Conv2d(3, 4, 1), x) == 1
    assert axis_of(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4).eval()), x) == 1
    assert axis_of(nn.Conv2d(3, 7, 1), x) == 1


def test_the_last_axis_holds_the_features_of_norms_though_there_are_as_many_positions() -> None:
    assert axis_of(nn.LayerNorm(4), torch.randn(2, 4, 4)) == 2
    assert axis_of(nn.Linear(3, 4, bias=False), torch.randn(2, 4, 3)) == 2


class Block(nn.Module):
    """Adds the result of a branch to its input, and may transpose the sum."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.norm, self.linear, self.turned = nn.LayerNorm(4), nn.Linear(4, 4), turned

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(self.norm(x))
        return x.transpose(1, 2) if self.turned else x


def test_a_block_has_the_features_where_what_it_adds_has_them() -> None:
    assert axis_of(Block(), torch.randn(2, 4, 4)) == 2
    assert axis_of(Block(turned=True), torch.randn(2, 4, 4)) == 1


def test_streams_beside_the_features_are_told_apart_though_a_layer_gives_a_weight_for_each() -> None:
    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights, self.linear = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.weights(x.flatten(1, 2).mean(1)).softmax(-1)
            return x + weights[:, None, :, None] * self.linear(x.mean(2)).unsqueeze(2)

    assert axis_of(Streams(), torch.randn(2, 3, 4, 4)) == 3


def test_a_norm_of_no_known_kind_has_the_features_where_what_it_takes_has_them() -> None:
    class RMSNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.square().mean(-1, keepdim=True).sqrt()

    assert axis_of(nn.Sequential(nn.Linear(6, 6), RMSNorm()), torch.randn(2, 4, 6)) == 2
    assert axis_of(nn.Sequential(nn.Conv1d(4, 4, 1), RMSNorm()), torch.randn(2, 4, 4)) == 1


def test_norms_behind_convolutions_with_computed_weights_and_before_rectifiers_tell_the_channels() -> None:
    """BiT has such layers: its weights are standardised, and its norms end with an activation."""

    class StandardisedConv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)

    class NormActivation(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(nn.functional.group_norm(x, self.num_groups, self.weight, self.bias))

    x = torch.randn(2, 4, 4, 4)
    assert axis_of(nn.Sequential(StandardisedConv(4, 4, 1), nn.ReLU(), NormActivation(2, 4)), x) == 1
    mixed = nn.Sequential(nn.Softmax(1), NormActivation(2, 4))  # softmax mixes the axis, so only the norm tells
    for picture, expected in (torch.randn(2, 4, 5, 5), {1}), (x, {1, 2, 3}):  # several axes are refused by their names
        with torch.no_grad():
            graph = Graph(mixed, lambda picture=picture: mixed(picture))
        assert graph.features_at(mixed[1], "output") == expected


def test_a_norm_of_each_head_that_takes_a_gate_too_has_the_features_along_its_vector() -> None:
    class GatedNorm(nn.Module):  # as in Kimi
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return self.weight * nn.functional.rms_norm(x, (6,)) * gate.sigmoid()

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(12, 12), GatedNorm()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x).view(*x.shape[:2], 2, 6), torch.ones(6))

    model, x = Heads(), torch.randn(3, 5, 12)
    with torch.no_grad():
        assert Graph(model, lambda: model(x)).features_at(model.norm, "output") == {3}


def test_layers_that_mix_either_of_two_axes_are_refused() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.features = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.features(x)
            return x + self.patches(x.transpose(1, 2)).transpose(1, 2)

    with pytest.raises(ValueError, match="axis 1, of size 4, or axis 2, of size 4, may"):
        axis_of(Mixer(), torch.randn(2, 4, 4))


@pytest.mark.parametrize(("turned", "expected"), [(False, {2}), (True, set())])
def test_what_takes_an_activation_tells_unless_it_takes_it_turned(turned: bool, expected: set[int]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.here = nn.Linear(4, 4), nn.Softmax(1)  # mixes axis 1, so the layer before it does not tell
            self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.here(self.first(x))
            return self.linear(x.transpose(1, 2) if turned else self.norm(x))

    model, x = Two(), torch.randn(2, 4, 4)
    assert Graph(model, lambda: model(x)).features_at(model.here, "output") == expected


def test_axes_that_nothing_tells_apart_are_named() -> None:
    with pytest.raises(ValueError, match="axis 1, of size 4, or axis 2, of size 6, may"):
        axis_of(nn.Identity(), torch.randn(2, 4, 6))


def test_a_convolution_that_turns_the_axes_around_has_its_features_last() -> None:
    class Head(nn.Conv1d):  # as in Parakeet
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    x = torch.randn(2, 5, 8)
    assert axis_of(Head(8, 3, 1), x) == axis_of(Head(8, 5, 1), x) == 2
    assert axis_of(nn.Conv1d(5, 3, 1), x) == 1
