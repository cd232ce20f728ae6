"""Which modules an adapter goes to: `exclude_modules`, `layers_to_transform`, `layers_pattern`, as for a LoRA."""

from __future__ import annotations

import re
import warnings

import peft
import pytest

from tests.lifecycle.verbs import KINDS, OF, OURS, TABLE, as_base, base, children
from tests.small_models import ARCHITECTURES

# Architecture → the suffix of a linear layer in every block.
LAYER = {"bert": "query", "gpt2": "c_attn", "llama": "q_proj", "t5": "q"}


def targets(kind: str, architecture: str, **fields: object) -> list[str]:
    """The modules that an adapter goes to, in the model's order."""
    model = base(architecture)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # LoRA on Conv1D
        model.add_adapter(OF[kind].config(**fields), "a")
    if kind in OURS:
        return children(model)
    return [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


CHOICES = {
    "all-linear without one kind of layer": {"target_modules": "all-linear", "exclude_modules": "LAYER"},
    "all-linear of the second block": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "the second block": {"target_modules": "LAYER", "layers_to_transform": 1},
    "both blocks by number": {"target_modules": "LAYER", "layers_to_transform": [0, 1]},
    "excluded by an expression": {"target_modules": "LAYER", "exclude_modules": r".*\.0\..*"},
    "by an expression": {"target_modules": r".*\.1\..*LAYER"},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("architecture", LAYER)
def test_targets_are_those_of_a_lora(architecture: str, kind: str, choice: str, matrix):
    layer = LAYER[architecture]
    fields = {key: [layer] if value == "LAYER" else value for key, value in CHOICES[choice].items()}
    if choice == "by an expression":
        fields["target_modules"] = CHOICES[choice]["target_modules"].replace("LAYER", layer)
    expected = targets("LoRA", architecture, **fields)
    assert expected and targets(kind, architecture, **fields) == expected
    for column in KINDS:
        matrix(TABLE, "`exclude_modules`, `layers_to_transform`, `layers_pattern`", column, "same")


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(("architecture", "pattern"), [("llama", "layers"), ("gpt2", "h"), ("bert", "layer")])
def test_layers_pattern(architecture: str, pattern: str, kind: str):
    fields = {"target_modules": [LAYER[architecture]], "layers_to_transform": [1], "layers_pattern": pattern}
    expected = targets("LoRA", architecture, **fields)
    assert len(expected) == 1 and targets(kind, architecture, **fields) == expected


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("architecture", [*LAYER, "vit"])
def test_defaults_are_narrowed_too(architecture: str, kind: str):
    """The fields work with `target_modules=None` too, for which PEFT has no default with LoRA on most models."""
    everywhere = targets(kind, architecture, target_modules=None)
    second = ARCHITECTURES[architecture].blocks.replace(r"\d+", "1")
    in_second = [path for path in everywhere if re.match(rf"{second}\.", path)]
    assert in_second and targets(kind, architecture, target_modules=None, layers_to_transform=[1]) == in_second
    without = targets(kind, architecture, target_modules=None, exclude_modules=[in_second[0]])
    assert without == [path for path in everywhere if path != in_second[0]]


@pytest.mark.parametrize("layers", [{"layers_to_transform": [0]}, {"layers_pattern": "layers"}], ids=str)
@pytest.mark.parametrize("target", ["all-linear", "All-Linear", r".*query"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_an_expression_or_of_all_linear_are_refused(kind: str, target: str, layers: dict[str, object]):
    with pytest.raises(ValueError, match=r"layers_to_transform|layers_pattern"):
        OF[kind].config(target_modules=target, **layers)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["nowhere"]},
        {"target_modules": ["query"], "exclude_modules": ["query"]},
        {"target_modules": ["query"], "layers_to_transform": [7]},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_left_to_act_on(kind: str, fields: dict[str, object]):
    model = base("bert")
    with pytest.raises(ValueError, match=r"not found|[Nn]o modules were targeted|All modules were excluded"):
        model.add_adapter(OF[kind].config(**fields), "a")
    assert kind not in OURS or as_base(model, "bert")


@pytest.mark.parametrize("kind", KINDS)
def test_an_exclusion_that_excludes_nothing_is_said(kind: str):
    with pytest.warns(UserWarning, match="no modules were excluded"):
        base("bert").add_adapter(OF[kind].config(exclude_modules=["nowhere"]), "a")
