"""Every metric describes itself, and loads as a class and as a script of `evaluate`, without a network."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

import hf_erasure.metrics as metrics
from hf_erasure.fitting.report import badness
from tests.metrics.samples import QUICK, inputs
from tests.prepared import LIBRARIES, run, run_code

LOAD_ALL = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise OSError("a metric asked for the network")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
import evaluate
from hf_erasure.metrics import METRICS, metric_path
from tests.metrics.samples import QUICK, inputs
from tests.prepared import LIBRARIES, run, run_code

found = {}
for name in METRICS:
    metric = evaluate.load(metric_path(name))
    assert type(metric).__name__ == METRICS[name].__name__, (name, type(metric))
    assert type(metric).__module__.startswith("evaluate_modules"), type(metric).__module__
    found[name] = metric.compute(**inputs(name), **QUICK)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The results of all metrics when `evaluate.load` reads their files, offline and with an empty cache."""
    home = tmp_path_factory.mktemp("hf")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(home)}
    done = run(run_code, LOAD_ALL, folder=home, kind=LIBRARIES, environment=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", metrics.METRICS)
def test_script_class_and_function_agree(name: str, loaded: dict):
    metric = metrics.METRICS[name]()
    direct = metric.compute(**inputs(name), **QUICK)
    assert loaded[name] == json.loads(json.dumps(direct))
    if name != "weat":  # its function has an argument for each of the four sets
        function = getattr(metrics, name).score
        assert function(*inputs(name).values(), **QUICK) == direct


@pytest.mark.parametrize("name", metrics.METRICS)
def test_figure_is_within_its_bounds_and_interval(name: str, loaded: dict):
    facts = metrics.METRICS[name].facts
    value, (low, high) = loaded[name][facts.figure], loaded[name]["intervals"][facts.figure]
    assert facts.bounds[0] <= value <= facts.bounds[1]
    assert low <= high
    assert facts.bounds[0] <= low and high <= facts.bounds[1]


@pytest.mark.parametrize("name", metrics.METRICS)
def test_facts_are_complete(name: str):
    metric = metrics.METRICS[name]()
    facts = metric.facts
    assert facts.url.startswith("https://") and facts.paper and facts.formula and facts.interval
    assert facts.better in ("lower", "higher", "closer")
    assert badness(facts.ideal, facts.better, facts.ideal) == 0.0
    assert facts.figure in str(facts) and facts.url in metric.description
    if facts.better != "closer" and math.isfinite(facts.bounds[0]):
        worse, better = sorted(facts.bounds, key=lambda bound: bound if facts.better == "higher" else -bound)
        least, most = (badness(value, facts.better, facts.ideal) for value in (better, worse))
        assert most > least or math.isinf(worse)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_same_seed_same_interval_and_other_seed_another(name: str):
    compute = metrics.METRICS[name]().compute
    first, again, other = (compute(**inputs(name), **QUICK, seed=seed)["intervals"] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("name", metrics.METRICS)
def test_a_refused_call_leaves_the_metric_usable(name: str):
    metric = metrics.METRICS[name]()
    with pytest.raises(ValueError, match="confidence=2"):
        metric.compute(**inputs(name), confidence=2, **QUICK)
    assert metric.compute(**inputs(name), **QUICK) == metrics.METRICS[name]().compute(**inputs(name), **QUICK)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_batches_add_up(name: str):
    columns, metric = inputs(name), metrics.METRICS[name]()
    half = len(columns["predictions"]) // 2
    for part in (slice(None, half), slice(half, None)):
        metric.add_batch(**{key: column[part] for key, column in columns.items()})
    assert metric.compute(**QUICK) == metrics.METRICS[name]().compute(**columns, **QUICK)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_numbers_that_are_none_are_refused(name: str):
    columns = inputs(name)
    score = getattr(metrics, name).score
    spoilt = [*columns["predictions"]]
    spoilt[1] = [math.nan] * len(spoilt[1]) if isinstance(spoilt[1], list) else math.nan
    if name == "tpr_gap":
        spoilt[1] = None
        with pytest.raises(ValueError, match="no label in row 1"):
            score(spoilt, columns["references"], columns["groups"])
        return
    if name == "weat":
        with pytest.raises(ValueError, match=r"NaN, infinity or None, first in row 1"):
            score(spoilt[:10], *[columns["predictions"][:10]] * 3)
        return
    with pytest.raises(ValueError, match=r"NaN, infinity or None, first in row 1"):
        score(spoilt, *list(columns.values())[1:])


@pytest.mark.parametrize("name", sorted(set(metrics.METRICS) - {"prediction_balance", "weat"}))
def test_lengths_that_differ_are_refused(name: str):
    first, *others = inputs(name).values()
    with pytest.raises(ValueError, match=r"give one for each"):
        getattr(metrics, name).score(first[:-1], *others)


@pytest.mark.parametrize("name", sorted(set(metrics.METRICS) - {"weat"}))
def test_no_rows_are_refused(name: str):
    with pytest.raises(ValueError, match=r"empty|hold|No class|are none"):
        getattr(metrics, name).score(*([] for _ in inputs(name)))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no metric 'bias': write one of crows_pairs"):
        metrics.metric_path("bias")


def test_every_metric_has_its_file():
    folder = Path(metrics.__file__).parent
    with_class = {path.stem for path in folder.glob("*.py") if "(base.Measure)" in path.read_text(encoding="utf-8")}
    assert with_class == set(metrics.METRICS)
