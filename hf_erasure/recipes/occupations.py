"""Sentences about people at work, written for this project: the data of the demo, which needs no download.

Every occupation is put into every template of its split, in a female and a male version that differ only in the cue
of gender. Gender is therefore independent of occupation, field and template, and a probe can read it only from the
cue: a pronoun, a first name, a noun such as *mother*, or a title. Train and test share no occupation, template, first
name or surname. They share the fields, so that a probe for the field can be tested on occupations it has never seen.
"""

from __future__ import annotations

import random
from pathlib import Path

import yaml
from datasets import Dataset, DatasetDict

from hf_erasure.adapters.common.files import read_text

# The name of these sentences in a recipe.
SOURCE = "occupations"
_MATERIAL = yaml.safe_load(read_text(Path(__file__).with_name("occupations.yaml")))
# Split → field → occupations; split → gender → first names; split → surnames; split → cities; split → templates.
OCCUPATIONS, FIRST_NAMES = _MATERIAL["occupations"], _MATERIAL["first_names"]
SURNAMES, CITIES, TEMPLATES = _MATERIAL["surnames"], _MATERIAL["cities"], _MATERIAL["templates"]
# Gender → slot of a template → word.
GENDERED = _MATERIAL["gendered"]


def occupation_sentences(seed: int = 0) -> DatasetDict:
    """Write the occupation sentences: 5,120 for training and 1,280 for testing, all distinct.

    Args:
        seed: Decides names, cities, numbers and the order of rows. Everything else is the same for every seed.

    Returns:
        Splits ``train`` and ``test`` with the string columns ``text``, ``gender`` (``"female"`` or ``"male"``),
        ``occupation``, ``field`` (one of eight) and the int64 column ``template``, an id unique over both splits.
        Each occupation of a split occurs once with each of its templates and each gender.

    Raises:
        TypeError: If ``seed`` is not an int.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}.")
    rng = random.Random(seed)
    return DatasetDict({split: Dataset.from_list(_rows(split, rng)) for split in TEMPLATES})


def _rows(split: str, rng: random.Random) -> list[dict[str, str | int]]:
    first_id = 0 if split == "train" else len(TEMPLATES["train"])
    rows: list[dict[str, str | int]] = []
    for field, occupations in OCCUPATIONS[split].items():
        for occupation in occupations:
            article = "an" if occupation[0] in "aeio" else "a"  # u: "university lecturer" takes "a"
            for template_id, template in enumerate(TEMPLATES[split], start=first_id):
                # What the female and the male version of a sentence have in common.
                shared = {
                    "occupation": occupation,
                    "an_occupation": f"{article} {occupation}",
                    "An_occupation": f"{article.capitalize()} {occupation}",
                    "surname": rng.choice(SURNAMES[split]),
                    "city": rng.choice(CITIES[split]),
                    "years": rng.choice(_MATERIAL["years"]),
                    "age": rng.choice(_MATERIAL["ages"]),
                    "year": rng.choice(_MATERIAL["dates"]),
                }
                for gender, words in GENDERED.items():
                    capitals = {"She": words["she"].capitalize(), "Her": words["her"].capitalize()}
                    slots = shared | words | capitals | {"name": rng.choice(FIRST_NAMES[split][gender])}
                    text = template.format_map(slots)
                    row = {"text": text, "gender": gender, "occupation": occupation, "field": field}
                    rows.append(row | {"template": template_id})
    rng.shuffle(rows)
    return rows
