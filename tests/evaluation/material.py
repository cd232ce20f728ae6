"""A small data folder, fitted adapters for the model, and made-up results to draw."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForMaskedLM, AutoTokenizer
from typer.testing import CliRunner, Result

from hf_erasure import ConceptErasureConfig, GradiendConfig, concept_dataloader, fit_concept_erasure
from hf_erasure.adapters import set_features, steer, targeted_parameters
from hf_erasure.cli import app
from hf_erasure.evaluation.data import DataFolder
from hf_erasure.evaluation.results import Results
from tests.adapters.gradiend.lifecycle import feature_of

PAIR = ("female", "male")
# The length of a text in the small data, in characters. A masked model needs a forward pass for each word of it.
_CHARACTERS = 60


def erasure_folder(assets: Path, story: str, folder: Path, pool: str = "mean") -> Path:
    """An erasure of gender for a model, fitted on biographies."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(story), AutoTokenizer.from_pretrained(story)
    found = DataFolder(assets / "data", 120).biographies()
    rows = Dataset.from_dict({"text": found.texts, "gender": found.genders})
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=list(PAIR)), adapter_name="erasure")
    batches = concept_dataloader(
        rows, tokenizer, text_column="text", label_column="gender", batch_size=40, max_length=64, labels=list(PAIR)
    )
    fit_concept_erasure(model, batches, "erasure", sequential=False, pool=pool, progress=False)
    model.save_pretrained(folder)
    return folder


def gradiend_folder(story: str, folder: Path, rate: float = 0.02) -> Path:
    """A GRADIEND adapter for a model, with a random feature, a learning rate and an encoder."""
    model = AutoModelForMaskedLM.from_pretrained(story)
    config = GradiendConfig(feature="gender", classes=list(PAIR), density=0.01, keep_encoder=True)
    model.add_adapter(config, adapter_name="steering")
    set_features(model, "steering", [feature_of(targeted_parameters(model, "steering"))], [PAIR])
    steer(model, "steering", learning_rate=rate)
    model.save_pretrained(folder)
    return folder


def small_data(assets: Path, folder: Path, parts: tuple[str, ...]) -> Path:
    """A data folder that has only some parts; its biographies and stories are cut short."""
    folder.mkdir()
    for part in parts:
        source = assets / "data" / part
        if part == "bias-in-bios":
            (folder / part).mkdir()
            for path in source.glob("*.csv"):
                _cut_biographies(path, folder / part / path.name)
        elif part == "tinystories-sample":
            (folder / part).mkdir()
            lines = (source / "tinystories.txt").read_text(encoding="utf-8").splitlines()
            short = "\n".join(line[:_CHARACTERS] for line in lines)
            (folder / part / "tinystories.txt").write_text(short, encoding="utf-8")
        else:
            (folder / part).symlink_to(source)
    return folder


def _cut_biographies(source: Path, target: Path) -> None:
    with source.open(encoding="utf-8", newline="") as read, target.open("w", encoding="utf-8", newline="") as written:
        rows = csv.DictReader(read)
        writer = csv.DictWriter(written, list(rows.fieldnames or ()))
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"hard_text": row["hard_text"][:_CHARACTERS]})


def run(*arguments: object) -> Result:
    """Run `hf-erasure evaluate`."""
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--no-progress"])


def saved(folder: Path) -> Results:
    """The results that a run wrote into a folder."""
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return Results(**{name: content[name] for name in Results.__dataclass_fields__})


def made_up(entries: int = 3) -> Results:
    """Results with every kind of figure, none of them measured."""
    draw = random.Random(0)
    names = ["base", *(f"adapter_with_a_long_name_{i}" for i in range(entries - 2)), "together"]
    measures: list[dict[str, Any]] = [
        {"key": "leak", "title": "Gender, linear probe − majority", "purpose": "bias", "figure": "leakage",
         "better": "lower", "says": "leakage <of> & gender", "source": "Someone 2020", "ideal": 0.0},
        {"key": "crows", "title": "CrowS-Pairs, % stereotype", "purpose": "bias", "figure": "score",
         "better": "closer", "says": "share", "source": "", "ideal": 50.0},
        {"key": "lms", "title": "StereoSet LMS", "purpose": "capability", "figure": "lms", "better": "higher",
         "says": "share", "source": "", "ideal": 100.0},
    ]  # fmt: skip
    values = {}
    for number, name in enumerate(names):
        leak, crows, lms = 0.4 - 0.15 * number, 60.0 - 3 * number, 80.0 - number
        values[name] = {
            "leak": {"value": leak, "interval": [leak - 0.05, leak + 0.05], "details": {}},
            "crows": {"value": crows, "interval": [crows - 5, crows + 5], "details": {}},
            "lms": {"value": lms, "interval": None, "details": {}},
        }
    layers = [*(f"layer {i}" for i in range(5)), "last_hidden_state"]
    depth = {
        name: [{"layer": layer, "leakage": 0.1 * number, "intervals": {"leakage": [0.0, 0.3]}} for layer in layers]
        for number, name in enumerate(names)
    }
    points = [{"x": draw.gauss(i % 2, 1), "y": draw.gauss(0, 1), "label": PAIR[i % 2]} for i in range(40)]
    jobs = [{"occupation": f"occupation{i}", "stereotype": PAIR[i % 2], "she": draw.random()} for i in range(30)]
    neuron = {"feature": "gender", "pair": list(PAIR), "cor": 0.9, "intervals": {"cor": [0.8, 1.0]},
              "values": {"female": [0.8, 0.9, 0.7], "male": [-0.9, -0.8], "neutral": [0.0, 0.1]}}  # fmt: skip
    return Results(
        about={"hf_erasure": "0", "model": "a <model>", "data": "data", "suite": "all", "limit": 5, "seed": 0,
               "resamples": 10, "confidence": 0.95, "note": "", "class": "BertModel", "predicts": None},
        entries=[{"name": n, "adapters": [], "kind": "", "strength": 1.0, "verified": {}} for n in names],
        measures=measures,
        values=values,
        not_measured=[{"measure": "SEAT", "entry": None, "reason": "the folder has no seat/"}],
        depth={"gender": depth},
        embedding=dict.fromkeys(names, points),
        shifts={name: {"occupations": jobs, "left_out": 2} for name in names},
        neurons={names[1]: neuron},
    )  # fmt: skip
