"""Readers and writers of the hidden state for every model type: complete, exact in weights, and as listed."""

from __future__ import annotations

import warnings

import pytest

from hf_erasure.models.streams import readers_of, writers_of
from tests.breadth import examples, kinds, streams, zoo

_MOST = 90  # Seconds; most types take one.
# With random weights UnivNet multiplies what float32 rounds by 1e7: its kernels are computed, and reach thousands.
_IN_DOUBLE = {"univnet"}


def _checked(model_type: str) -> dict[str, str]:
    """Check both presets on a type, and return the messages of those that are refused."""
    model = zoo.build(model_type)
    batch = examples.batch_of(model)
    if model_type in _IN_DOUBLE:
        model, batch = model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    examples.checked(model, batch)
    refused = {}
    presets = {"readers": (readers_of, streams.check_readers), "writers": (writers_of, streams.check_writers)}
    for word, (find, check) in presets.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = find(model)
        except ValueError as error:
            refused[word] = str(error)
        else:
            check(model, batch, found)
    return refused


@pytest.mark.filterwarnings("ignore:target_modules='readers' does not guard")
@pytest.mark.parametrize("model_type", kinds.chosen(kinds.STREAMS))
def test_erasers_at_readers_and_writers(model_type: str):
    refused = _checked(model_type)
    assert "readers" not in refused
    assert "target_modules='readers'" in refused.get("writers", "target_modules='readers'")
    assert streams.told(zoo.build(model_type)) == streams.listed()[model_type]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", zoo.TYPES)
def test_erasers_at_readers_and_writers_of_every_type(model_type: str):
    try:
        with zoo.at_most(_MOST):
            refused = _checked(model_type)
    except zoo.NotBuiltError as error:
        pytest.skip(str(error))
    for reason in refused.values():
        assert "target_modules" in reason or "dummy input" in reason
