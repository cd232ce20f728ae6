"""An adapter's concept is told by its name and its classes."""

from __future__ import annotations

import pytest

from hf_erasure import ConceptErasureConfig, GradiendConfig
from hf_erasure.fitting.figures import GENDER, POS, STEREOTYPES, concept_of_config


@pytest.mark.parametrize(
    ("config", "concept"),
    [
        (ConceptErasureConfig(concept="gender", labels=["0", "1"]), GENDER),
        (ConceptErasureConfig(concept="no_Gender-bias", labels=["0", "1"]), GENDER),
        (ConceptErasureConfig(concept="genderBias", labels=["0", "1"]), GENDER),
        (ConceptErasureConfig(labels=["male", "female"]), GENDER),
        (GradiendConfig(feature="pronouns of people", classes=["a", "b"]), GENDER),
        (GradiendConfig(feature="who", classes=["she", "he"]), GENDER),
        (GradiendConfig(feature="who", classes=["she", "he", "they"]), GENDER),
        (GradiendConfig(feature="article", classes=["masculine", "feminine", "neuter"]), "article"),
        (ConceptErasureConfig(concept="part of speech", labels=["a", "b"]), POS),
        (ConceptErasureConfig(labels=["NOUN", "VERB", "ADJ"]), POS),
        (ConceptErasureConfig(concept="stereotypes", labels=["a", "b"]), STEREOTYPES),
        (GradiendConfig(feature="religion", classes=["jewish", "christian", "muslim"]), "religion"),
        (ConceptErasureConfig(concept="race", labels=["black", "white"]), "race"),
        (ConceptErasureConfig(concept="engendered", labels=["f1", "m1"]), "engendered"),
        (ConceptErasureConfig(concept_dim=1), "concept"),
        (object(), None),
    ],
)
def test_concepts(config: object, concept: str | None) -> None:
    assert concept_of_config(config) == concept
