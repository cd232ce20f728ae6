"""When a value counts as better or worse than the base's, and the concept of an adapter, from its name and classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hf_erasure import ConceptErasureConfig, GradiendConfig
from hf_erasure.fitting.report import (
    GENDER,
    POS,
    STEREOTYPES,
    ErasureReport,
    SiteReport,
    badness,
    concept_of_config,
    verdict,
)


@pytest.mark.parametrize(
    ("base", "value", "interval", "better", "ideal", "said"),
    [
        (0.4, 0.2, [0.1, 0.3], "lower", 0.0, "better"),
        (0.4, 0.6, [0.5, 0.7], "lower", 0.0, "worse"),
        (0.4, 0.2, [0.0, 0.4], "lower", 0.0, ""),  # the interval's end is the base's value
        (0.4, 0.2, None, "lower", 0.0, ""),
        (0.05, -0.1, [-0.2, 0.0], "lower", 0.0, "better"),
        (-0.05, -0.2, [-0.3, -0.1], "lower", 0.0, ""),  # below the ideal, lower is not better
        (60.0, 52.0, [48.0, 56.0], "closer", 50.0, "better"),
        (60.0, 35.0, [30.0, 40.0], "closer", 50.0, "worse"),
        (60.0, 40.0, [35.0, 45.0], "closer", 50.0, ""),  # as far from the ideal, on the other side
        (0.9, 0.8, [0.75, 0.85], "higher", 1.0, "worse"),
        (1.1, 1.3, [1.2, 1.4], "higher", 1.0, ""),  # above the ideal, higher is not worse
        (0.9, 1.3, [1.2, 1.4], "higher", 1.0, "better"),
        (20.0, 25.0, [24.0, 26.0], "lower", None, "worse"),
        (0.5, 0.7, [0.6, 0.8], "higher", None, "better"),
    ],
)
def test_an_interval_that_holds_the_bases_value_is_no_change(base, value, interval, better, ideal, said) -> None:
    assert verdict(base, value, interval, better, ideal) == said


def test_what_is_beyond_the_ideal_is_bad_only_where_it_is_to_be_met() -> None:
    assert badness(1.5, "higher", 1.0) == badness(-0.5, "lower", 0.0) == 0.0
    assert badness(45.0, "closer", 50.0) == badness(55.0, "closer", 50.0) == 5.0


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


def report_of(after: float, interval: tuple[float, float], fitted: int = 0) -> ErasureReport:
    """A report of an erasure of two classes fitted on 5,120 texts and measured on 1,280 others."""
    last = SiteReport("last_hidden_state", width=384, correlation_before=0.964, correlation_after=after,
                      interval_after=interval)  # fmt: skip
    return ErasureReport("gender", "default", "leace", "mean", "", 5120, 9, 1280, fitted, [last], classes=2)


def test_what_is_expected_of_other_texts_does_not_deny_what_was_measured() -> None:
    within = report_of(0.1, (0.04, 0.16))
    assert within.expected_reading == pytest.approx(0.61, abs=0.005)
    assert "on other texts is expected to read about 61%" in within.outlook
    beyond = report_of(0.796, (0.78, 0.82)).outlook
    # Two classes with means 2.5 standard deviations apart have a correlation of 0.78; a probe reads them with Φ(1.25).
    assert "reads 89% or more, where the formula for 5120 texts\nof one kind expects 61%" in beyond
    assert "on other texts" not in beyond
    # If the concept was erased within each environment, less is left than the formula expects.
    assert replace(within, environments=40).expected_reading is None
    # Rows that were fitted on do not show how other texts are read.
    assert report_of(0.796, (0.78, 0.82), fitted=1280).outlook == within.outlook


def test_a_report_as_data_and_as_tables(tmp_path: Path) -> None:
    sites = [
        SiteReport("layer_1.norm", rank=1, rows=8, correlation_before=0.9, correlation_after=0.1,
                   interval_before=(0.8, 0.95), interval_after=(0.0, 0.2), change_labelled=0.05),
        SiteReport("last_hidden_state", correlation_before=0.9, correlation_after=0.1),
    ]  # fmt: skip
    report = ErasureReport("gender", "default", "leace", "mean", "", 8, 20, 4, 0, sites)
    content = json.loads(report.to_json(tmp_path / "report.json"))
    assert content == json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert content["leakage"]["layer_1.norm"] == [0.9, 0.1] and content["measured_on"] == "4 held-out examples"
    head, rule, first, last = report.to_markdown().splitlines()
    assert head.count("|") == rule.count("|") == first.count("|") == last.count("|") == 8
    assert "0.900 [0.80, 0.95]" in first
    latex = report.to_latex()
    assert r"layer\_1.norm & 1 & 8" in latex and r"5.0\% & - \\" in latex and latex.count("&") == 3 * 6
