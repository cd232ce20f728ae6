"""Gathering, keeping and merging moments; refusals; and the possible sources of Σ."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.covariance import OAS
from torch import Tensor

from hf_erasure.erasers import ConceptMoments, Eraser
from hf_erasure.erasers.statistics import PackedGram
from tests.erasers.data import as_values, canonical_correlations, leak, moments_of, rows

TENSORS = ("mean_x", "mean_z", "covariance_x", "cross_covariance", "covariance_z")


def same(one: ConceptMoments, other: ConceptMoments) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)


def alike(one: ConceptMoments, other: ConceptMoments) -> bool:
    """Whether the same rows were counted, up to the order in which they were added.

    A selection of rows lies elsewhere in memory, where the vector units of some processors add the rows in another
    order: at most the number of rows (300) times 2^-53 times the magnitude of a term (below 9 for products).
    """
    close = (torch.allclose(getattr(one, name), getattr(other, name), rtol=0, atol=3e-13) for name in TENSORS)
    return one.rows == other.rows and all(close)


@pytest.mark.parametrize("width", [1, 5, 127, 129, 300, 1100])
def test_moments_equal_the_definition(width: int) -> None:
    x, z = rows(600, width, 3)
    moments, values = moments_of(x, z), as_values(z)
    assert torch.allclose(moments.mean_x, x.mean(0), rtol=1e-12, atol=1e-12)
    assert torch.allclose(moments.mean_z, values.mean(0), rtol=1e-14)
    truth = torch.cov(x.T, correction=0).reshape(width, width)
    scale = float(truth.diagonal().max())
    assert float((moments.covariance_x - truth).abs().max()) < 1e-13 * scale
    assert torch.equal(moments.covariance_x, moments.covariance_x.T)
    cross = (x - x.mean(0)).T @ (values - values.mean(0)) / 600
    assert float((moments.cross_covariance - cross).abs().max()) < 1e-13 * scale
    assert torch.allclose(moments.covariance_z, torch.cov(values.T, correction=0), atol=1e-15)
    assert torch.equal(moments.state_dict()["counts"], torch.bincount(z))
    assert (moments.rows, moments.weight, moments.spread().effective_rows) == (600, 600.0, 600.0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Products round to the precision of float32 or float64, a few rows at a time.
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
)
def test_any_float_dtype(dtype: torch.dtype, tolerance: float) -> None:
    x, z = rows(500, 40, 2)
    x = x.to(dtype)
    moments = moments_of(x, z)
    truth = torch.cov(x.double().T, correction=0)
    assert float((moments.covariance_x - truth).abs().max() / truth.max()) < tolerance
    assert torch.allclose(moments.mean_x, x.double().mean(0), rtol=1e-12, atol=1e-14)
    assert moments.covariance_x.dtype == torch.float64


def test_leading_dimensions_are_rows() -> None:
    x, z = rows(60, 8, 3)
    assert same(ConceptMoments(8, 3).update(x.view(3, 4, 5, 8), z.view(3, 4, 5)), moments_of(x, z))
    assert ConceptMoments(8, 0).update(x[0]).rows == 1


def test_ids_one_hot_bool_and_integer_values_agree() -> None:
    x, z = rows(300, 8, 3)
    by_id = moments_of(x, z)
    one_hot = as_values(z)
    for values in (one_hot, one_hot.float(), one_hot.long(), one_hot.bool()):
        by_value = ConceptMoments(8, 3).update(x, values)
        assert "counts" not in by_value.state_dict()
        for name in TENSORS:
            assert torch.allclose(getattr(by_value, name), getattr(by_id, name), atol=1e-13)
    two = moments_of(*rows(300, 8, 2))
    x, z = rows(300, 8, 2)
    assert same(ConceptMoments(8, 2).update(x, z.bool()), two)
    assert ConceptMoments(8, 1).update(x, z.float()).cross_covariance.shape == (8, 1)


def test_ignored_ids_masks_and_zero_weights_leave_the_same_rows() -> None:
    x, z = rows(300, 8, 3)
    keep = torch.arange(300) % 3 != 0
    expected = ConceptMoments(8, 3).update(x[keep], z[keep])
    poisoned = torch.where(keep[:, None], x, torch.nan)
    ignored = torch.where(keep, z, -100)
    assert alike(ConceptMoments(8, 3).update(poisoned, ignored), expected)
    assert alike(ConceptMoments(8, 3).update(poisoned, z, mask=keep), expected)
    assert alike(ConceptMoments(8, 3).update(poisoned, z, keep.float()), expected)
    weights = torch.where(keep, 1.0, torch.nan)
    assert ConceptMoments(8, 3).update(x, z, weights, mask=keep).rows == expected.rows


def test_an_integer_attention_mask_is_a_mask() -> None:
    x, z = rows(30, 4, 2)
    keep = torch.arange(30) < 20
    assert alike(ConceptMoments(4, 2).update(x, z, mask=keep.long()), ConceptMoments(4, 2).update(x[:20], z[:20]))


def test_a_batch_without_counted_rows_changes_nothing() -> None:
    x, z = rows(30, 4, 2)
    moments = ConceptMoments(4, 2)
    assert moments.update(x, torch.full_like(z, -100)).rows == 0
    moments.update(x, z)
    before = copy.deepcopy(moments)
    moments.update(x, z, mask=torch.zeros(30, dtype=torch.bool))
    assert same(moments, before)


def test_effective_rows_of_weights() -> None:
    x, z = rows(4, 3, 2)
    weight = torch.tensor([1.0, 1.0, 2.0, 0.0])
    moments = ConceptMoments(3, 2).update(x, z, weight)
    assert moments.spread().effective_rows == pytest.approx(16 / 6)
    assert moments.weight == 4.0
    twice = ConceptMoments(3, 2).update(x, z, weight).merge(moments)
    assert twice.spread().effective_rows == pytest.approx(64 / 12)


@pytest.mark.parametrize("labels", ["ids", "values"])
def test_state_survives_a_file(tmp_path: Path, labels: str) -> None:
    x, z = rows(300, 150, 3, dtype=torch.float32)
    y = z if labels == "ids" else as_values(z)
    moments = ConceptMoments(150, 3).update(x[:200], y[:200])
    save_file(moments.state_dict(), tmp_path / "moments.safetensors")
    loaded = ConceptMoments(150, 3)
    loaded.load_state_dict(load_file(tmp_path / "moments.safetensors"))
    assert same(loaded, moments)
    assert loaded.spread().resolution == moments.spread().resolution
    assert same(loaded.update(x[200:], y[200:]), moments.update(x[200:], y[200:]))
    assert torch.equal(loaded.eraser().left, moments.eraser().left)


def test_a_state_is_a_copy_and_an_empty_one_empties() -> None:
    x, z = rows(100, 5, 2)
    moments = moments_of(x, z)
    state = moments.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    moments.update(x + 1, z)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    fresh = ConceptMoments(5, 2)
    fresh.load_state_dict(state)
    fresh.update(x, z)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    moments.load_state_dict(ConceptMoments(5, 2).state_dict())
    assert moments.rows == 0


def test_pickle_and_deepcopy() -> None:
    moments = moments_of(*rows(100, 5, 2))
    for other in (pickle.loads(pickle.dumps(moments)), copy.deepcopy(moments)):
        assert same(other, moments)
        other.update(*rows(100, 5, 2, seed=1))
        assert not same(other, moments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("cross"), "lacks 'cross'"),
        (lambda s: s.update(mean_x=torch.zeros(4)), r"'mean_x' in the state has shape \(4,\): it must be \(5,\)"),
        (lambda s: s["gram"].fill_(torch.nan), "'gram' in the state is not finite"),
        (lambda s: s.update(x_dim=torch.tensor(7)), "x_dim=7, but these moments have x_dim=5"),
        (lambda s: s.update(counts=torch.zeros(3)), r"'counts' in the state has shape \(3,\)"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change, message: str) -> None:
    moments = moments_of(*rows(100, 5, 2))
    before = copy.deepcopy(moments)
    state = moments_of(*rows(100, 5, 2, seed=1)).state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        moments.load_state_dict(state)
    assert same(moments, before)


def test_merging_leaves_the_other_as_it_is() -> None:
    one, other = moments_of(*rows(100, 5, 2)), moments_of(*rows(80, 5, 2, seed=1))
    before = copy.deepcopy(other)
    empty = ConceptMoments(5, 2)
    assert same(empty.merge(other), other)
    empty.update(*rows(10, 5, 2, seed=2))
    assert same(other, before)
    assert one.merge(ConceptMoments(5, 2)).rows == 100
    assert one.merge(other).rows == 180
    assert same(other, before)
    assert one.merge(one).rows == 360


def test_merging_refuses_what_does_not_fit() -> None:
    one = moments_of(*rows(100, 5, 2))
    with pytest.raises(ValueError, match=r"other has x_dim=6, z_dim=2.*x_dim=5"):
        one.merge(moments_of(*rows(100, 6, 2)))
    with pytest.raises(TypeError, match="other is dict"):
        one.merge({})  # type: ignore[arg-type]
    assert one.rows == 100


def bad_updates() -> list:
    x, z = rows(12, 4, 3)
    mask, weight = torch.ones(12, dtype=torch.bool), torch.ones(12)
    negative = torch.where(torch.arange(12) == 5, -1.0, 1.0)
    return [
        ((x.tolist(), z), {}, TypeError, "x is list"),
        ((x.long(), z), {}, TypeError, "x has dtype torch.int64"),
        ((x.to(torch.complex64), z), {}, TypeError, "x has dtype torch.complex64"),
        ((x, z.tolist()), {}, TypeError, "z is list"),
        ((x,), {}, ValueError, "z is missing.*z_dim=3"),
        ((x, z[:5]), {}, ValueError, r"z has shape \(5,\).*\(12, 3\)"),
        ((x, z.float()), {}, ValueError, r"z has shape \(12,\) and dtype torch.float32.*integer class ids"),
        ((x, z + 1), {}, ValueError, "class id 3, but z_dim=3: ids run from 0 to 2"),
        ((x, z - 1), {}, ValueError, "class id -1"),
        ((x, torch.full((12, 3), -100)), {}, ValueError, "holds -100.*mask="),
        ((x, z, weight[:5]), {}, ValueError, r"weight has shape \(5,\)"),
        ((x, z, negative), {}, ValueError, r"weight has 1 entries.*-1.0 at row 5"),
        ((x, z, weight * torch.nan), {}, ValueError, "weight has 12 entries"),
        ((x, z, weight.tolist()), {}, TypeError, "weight is list"),
        ((x, z), {"mask": mask[:5]}, ValueError, r"mask has shape \(5,\)"),
        ((x, z), {"mask": weight}, TypeError, "mask is torch.float32"),
        ((x * 1e200, z), {}, ValueError, "squares overflow float64"),
    ]


@pytest.mark.parametrize(("arguments", "keywords", "error", "message"), bad_updates())
def test_bad_updates_are_refused_and_change_nothing(arguments, keywords, error, message: str) -> None:
    moments = ConceptMoments(4, 3).update(*rows(30, 4, 3, seed=5))
    before = copy.deepcopy(moments)
    with pytest.raises(error, match=message):
        moments.update(*arguments, **keywords)
    assert same(moments, before)
    assert moments.spread().resolution == before.spread().resolution
    with pytest.raises(error, match=message):
        ConceptMoments(4, 3).update(*arguments, **keywords)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 2), ValueError, "x_dim is 0"),
        ((4, -1), ValueError, "z_dim is -1"),
        ((4.0, 2), TypeError, "x_dim is 4.0"),
        ((4, True), TypeError, "z_dim is True"),
    ],
)
def test_bad_dimensions_are_refused(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        ConceptMoments(*arguments)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"method": "pca"}, ValueError, "method is 'pca'.*'leace', 'orth'"),
        ({"method": "rlace"}, ValueError, r"do not keep them: call Eraser.fit"),
        ({"rounds": 2}, ValueError, "only 'inlp' has rounds"),
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"rank": 1.0}, TypeError, "rank is 1.0"),
        ({"shrinkage": "lw"}, ValueError, "shrinkage is 'lw'"),
        ({"shrinkage": 1.5}, ValueError, "shrinkage is 1.5"),
        ({"shrinkage": True, "method": "orth"}, ValueError, "shrinkage is True"),
        ({"background_weight": 1.5}, ValueError, "background_weight is 1.5"),
        ({"background_weight": "all"}, TypeError, "background_weight is 'all'"),
        ({"background": {}}, TypeError, "background is dict"),
        ({"background": ConceptMoments(5, 0)}, ValueError, "background has x_dim=5.*x_dim=4"),
        ({"background": ConceptMoments(4, 0)}, ValueError, r"background has x_dim=4 and rows=0"),
    ],
)
def test_bad_options_of_an_eraser_are_refused(keywords, error, message: str) -> None:
    with pytest.raises(error, match=message):
        moments_of(*rows(30, 4, 3)).eraser(**keywords)


def test_moments_without_rows_say_so() -> None:
    moments = ConceptMoments(4, 2)
    assert (moments.rows, moments.weight, repr(moments)) == (0, 0.0, "ConceptMoments(x_dim=4, z_dim=2, rows=0)")
    for read in (lambda: moments.mean_x, lambda: moments.covariance_x, moments.eraser):
        with pytest.raises(ValueError, match=r"rows=0.*call update"):
            read()


def test_a_background_knows_no_concept() -> None:
    x, z = rows(30, 4, 2)
    background = ConceptMoments(4, 0)
    with pytest.raises(ValueError, match="z_dim=0"):
        background.update(x, z)
    background.update(x)
    assert background.cross_covariance.shape == (4, 0)
    assert background.merge(ConceptMoments(4, 0).update(x)).rows == 60
    with pytest.raises(ValueError, match="a background without a concept"):
        background.eraser()


def test_a_background_decides_what_changes_least() -> None:
    x, z = rows(2000, 12, 2)
    other = 3 * rows(2000, 12, 2, seed=8)[0] + 2
    moments, background = moments_of(x, z), ConceptMoments(12, 0).update(other)
    plain, guarded = moments.eraser(), moments.eraser(background=background)
    assert torch.allclose(guarded.bias, other.mean(0))
    assert leak(guarded(x), z, x) < 1e-12  # float64 rounding
    assert background.spread().change(guarded) < background.spread().change(plain)
    assert moments.spread().change(guarded) > moments.spread().change(plain)
    half = moments.eraser(background=background, background_weight=0.5)
    assert torch.allclose(half.bias, (x.mean(0) + other.mean(0)) / 2)
    none = moments.eraser(background=background, background_weight=0.0)
    assert torch.allclose(none.matrix, plain.matrix, atol=1e-12)


def test_a_feature_that_the_background_never_moves() -> None:
    x, z = rows(500, 6, 2)
    other = rows(500, 6, 2, seed=8)[0]
    other[:, 2] = 1.0
    eraser = moments_of(x, z).eraser(background=ConceptMoments(6, 0).update(other))
    assert leak(eraser(x), z, x) < 1e-12
    assert bool(eraser(other).isfinite().all())


def test_shrinkage_is_that_of_oas_on_standardised_rows() -> None:
    x, _ = rows(80, 30, 2)
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    expected = OAS(assume_centered=True).fit(standard.numpy()).shrinkage_
    spread = ConceptMoments(30, 0).update(x).spread()
    ours = spread.share("oas", spread.variance.rsqrt())
    assert ours == pytest.approx(expected, rel=1e-9)
    assert 0 < ours < 1
    white = ConceptMoments(2, 0).update(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])).spread()
    assert white.share("oas", torch.ones(2, dtype=torch.float64)) == 1.0  # keep nothing of the estimate


def test_full_shrinkage_keeps_only_variances() -> None:
    x, z = rows(500, 6, 2)
    scale = x.std(0, correction=0)
    shrunk = moments_of(x, z).eraser(shrinkage=1.0)
    orthogonal = Eraser.fit(x / scale, z, "orth")
    assert torch.allclose(shrunk.matrix, scale[:, None] * orthogonal.matrix / scale, atol=1e-10)


def test_a_capped_rank_takes_the_largest_canonical_correlation() -> None:
    x, z = rows(2000, 10, 4)
    moments = moments_of(x, z)
    before = canonical_correlations(x, z)
    capped = moments.eraser(rank=1, shrinkage=None)
    after = canonical_correlations(capped(x), z)
    assert before.shape == (3,)
    assert bool((before.diff() <= 0).all())
    assert capped.rank == 1
    assert torch.allclose(after[:2], before[1:], atol=1e-6)
    assert float(after[2]) < 1e-6  # the jitter of 1e-13 bounds rounding by its square root


def test_inference_mode_and_autocast_leave_no_trace() -> None:
    x, z = rows(300, 20, 2, dtype=torch.float32)
    plain = moments_of(x, z)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ConceptMoments(20, 2).update(x.clone(), z)
        eraser = inside.eraser()
    assert same(inside, plain)
    assert not eraser.left.is_inference()
    assert torch.equal(eraser.left, plain.eraser().left)
    inside.update(x, z)  # outside of inference mode, in place
    x.requires_grad_()
    assert same(moments_of(x, z), plain)


def test_reduced_matmul_precision_does_not_reach_the_products() -> None:
    x, z = rows(300, 64, 2, dtype=torch.float32)
    truth = torch.cov(x.double().T, correction=0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        moments = moments_of(x, z)
    finally:
        torch.set_float32_matmul_precision(before)
    assert float((moments.covariance_x - truth).abs().max() / truth.max()) < 1e-6  # float32, not bfloat16


def test_an_interrupted_update_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    x, z = rows(300, 20, 2)
    moments = moments_of(x, z)
    state = moments.state_dict()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PackedGram, "absorb", interrupt)
        with pytest.raises(KeyboardInterrupt):
            moments.update(x, z)
    for use in (moments.eraser, lambda: moments.update(x, z), lambda: moments.mean_x, moments.state_dict):
        with pytest.raises(RuntimeError, match="interrupted"):
            use()
    moments.load_state_dict(state)
    assert moments.update(x, z).rows == 600


def test_an_interruption_before_the_sums_are_touched_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, z = rows(300, 20, 2)
    moments = moments_of(x, z)
    before = copy.deepcopy(moments)

    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(PackedGram, "columns", exhausted)
        with pytest.raises(MemoryError):
            moments.update(x, z)
    assert same(moments, before)


def peak_bytes(run) -> int:
    """The most bytes that torch's allocator held during a call, above those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("width", [512, 768, 1536])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64", "masked", "weighted", "values"])
def test_memory_while_updating(width: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(4096, width, generator=generator), torch.randint(3, (4096,), generator=generator)
    labels = as_values(z, 3) if kind == "values" else z
    x = x.to(getattr(torch, kind)) if kind in ("bfloat16", "float64") else x
    mask = torch.arange(4096) % 10 != 0 if kind == "masked" else None
    weight = torch.rand(4096, generator=generator) if kind == "weighted" else None
    moments = ConceptMoments(width, 3)

    def update() -> Tensor | ConceptMoments:
        moments.update(x, labels, weight, mask=mask)
        return moments.update(x, labels, weight, mask=mask)

    # The bytes include the statistics themselves, which are allocated here.
    peak = peak_bytes(update)
    assert width**2 * 4 < peak <= 4 * width**2 * 4
