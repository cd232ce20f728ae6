"""Comparing features: against vectors written out, and how a budget is compared with a cost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hf_erasure.fitting.gradiend import compare_features
from hf_erasure.fitting.gradiend.selection import Point, Scorer, choose
from tests.fitting.gradiend.test_evaluation import GENDERS, Language
from tests.fitting.gradiend.test_trainer import adapted, trainer_of
from tests.gradiend.data import decode


def test_features_beside_each_other_are_as_their_vectors_say(tmp_path: Path):
    dense, sparse = (trainer_of(adapted("llama", density=d), "llama", tmp_path) for d in (1.0, 0.02))
    other = trainer_of(adapted("llama"), "llama", tmp_path, estimator="trained", max_steps=2, seeds=2, convergence=0.0)
    trainers = {"dense": dense, "sparse": sparse, "trained": other}
    vectors = {}
    for name, trainer in trainers.items():
        trainer.train()
        decoder = trainer.fitted[0].feature.decoder
        decoder = decoder.prune(0.02) if name == "sparse" else decoder
        decoded = zip(decode(decoder, 1.0).values(), decode(decoder, -1.0).values(), strict=True)
        vectors[name] = torch.cat([(a - b).flatten() for a, b in decoded]).double() / 2
    found = compare_features(trainers, top=0.01)
    assert found.names == ["dense", "sparse", "trained"]
    wanted = math.ceil(0.01 * vectors["dense"].numel())
    largest = {name: set(vector.abs().topk(wanted).indices.tolist()) for name, vector in vectors.items()}
    for i, one in enumerate(found.names):
        for j, two in enumerate(found.names):
            a, b = vectors[one], vectors[two]
            # decode adds and subtracts a bias in float32.
            assert float(found.cosine[i, j]) == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-4)
            assert float(found.overlap[i, j]) == pytest.approx(len(largest[one] & largest[two]) / wanted, abs=0.02)
    assert found.reading is not None
    for i, trainer in enumerate(trainers.values()):  # All trainers have the same pairs.
        assert found.reading[i].tolist() == pytest.approx([trainer.evaluate()["cor"]] * 3, nan_ok=True)
    assert len(found.to_pandas()) == 9 and set(found.to_pandas().columns) >= {"cosine", "overlap", "reading"}
    found.plot(str(tmp_path / "features.png"))
    assert (tmp_path / "features.png").stat().st_size > 0
    summary = other.summary()
    assert summary["starts"].tolist() == [2] and summary["pair"].tolist() == ["female/male"]
    best = [start["correlation"] for start in other.starts]
    assert summary["max"].tolist() == [max(best)] and summary["mean"][0] == pytest.approx(sum(best) / 2)
    assert other.starts[[start["seed"] for start in other.starts].index(summary["seed"][0])]["correlation"] == max(best)
    with pytest.raises(ValueError, match="1 features to compare"):
        compare_features({"dense": dense})
    with pytest.raises(ValueError, match="top=0"):
        compare_features(trainers, top=0)


def test_the_budget_is_held_against_the_upper_end_of_the_cost():
    generator = torch.Generator().manual_seed(0)
    texts = torch.rand(200, generator=generator, dtype=torch.float64) * 30 + 10
    base = torch.stack([texts, texts / 20, texts / 2], 1)
    worse = base.clone()
    worse[:, 0] *= 1 + 0.01 + 0.2 * torch.randn(200, generator=generator, dtype=torch.float64)
    current = [base]

    scorer = Scorer(GENDERS, lambda: torch.tensor([[0.5, 0.4]]), Language(lambda: current[0]))
    start = scorer.score(GENDERS, 0.0, 0.0, None)
    current[0] = worse
    point = scorer.score(GENDERS, 1.0, 0.1, start)
    draws = torch.randint(200, (4000, 200), generator=generator)
    costs = worse[draws, 0].sum(1) / base[draws, 0].sum(1) - 1
    assert point.cost_upper == pytest.approx(float(costs.quantile(0.95)), rel=0.05)
    good = Point(**{**vars(point), "goals": {"bpi": start.goals["bpi"] + 1}})
    budget = (point.cost + point.cost_upper) / 2
    with pytest.warns(UserWarning, match="on texts like these"):
        assert choose(start, [good], "bpi", budget) is start
    assert choose(start, [good], "bpi", point.cost_upper) is good


def test_figures_of_single_texts_add_up(tmp_path: Path):
    trainer = trainer_of(adapted("bert"), "bert", tmp_path)
    language = trainer.scorer().language
    figures, by_text = language.score(), language.by_text()
    assert by_text.shape[1] == 3 and len(by_text) > 1
    assert figures["loss"] == pytest.approx(float(by_text[:, 0].sum() / by_text[:, 2].sum()))
    assert figures["lms"] == pytest.approx(float(by_text[:, 1].sum() / by_text[:, 2].sum()))
