"""Splits that share rows give a warning, whatever their order, their padding and the number of passes over them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from hf_erasure import ConceptErasureConfig, fit_concept_erasure, verify_adapter
from hf_erasure.erasers import correlation_interval
from hf_erasure.fitting.heldout import hashes_of
from hf_erasure.fitting.report import ErasureReport
from tests.small_models import ARCHITECTURES, LABELS, small_batches

NAME = "no_gender"


def fitted(name: str, batches: Any, eval_batches: Any = None, **options: Any) -> tuple[Any, ErasureReport, list[str]]:
    model = ARCHITECTURES[name].build()
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=LABELS), adapter_name=NAME)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = fit_concept_erasure(model, batches, NAME, eval_batches=eval_batches, progress=False, **options)
    return model, report, [text for text in (str(w.message) for w in seen) if "rows of eval_batches" in text]


def repadded(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same rows in reverse order, one in each batch, with three more columns of padding on the left."""
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(16)]
    wider = {"input_ids", "attention_mask"}
    return [
        {key: torch.nn.functional.pad(v, (3, 0)) if key in wider else v for key, v in row.items()}
        for row in reversed(rows)
    ]


@pytest.mark.parametrize("sequential", [True, False])
def test_the_same_rows_in_another_order_padding_and_epoch_are_fitted_rows(sequential: bool) -> None:
    batches = small_batches("bert", 2)
    again = [*repadded(batches), *batches]
    _, report, told = fitted("bert", iter(batches), again, sequential=sequential)
    assert report.eval_fitted == report.eval_examples == 64 and report.measured_on == "fitted rows (all of 64)"
    assert len(told) == 1 and "64 of the 64" in told[0]
    assert "on fitted rows (all of 64)" in repr(report)


def test_some_shared_rows_are_counted_and_other_rows_are_held_out() -> None:
    batches, others = small_batches("bert", 2), small_batches("bert", 2, seed=500)
    _, report, told = fitted("bert", batches, [batches[0], *others])
    assert report.measured_on == "fitted rows (16 of 48)" and "16 of the 48" in told[0]
    _, report, told = fitted("bert", batches, others)
    assert not told and report.measured_on == "32 held-out examples" and "on 32 held-out examples" in repr(report)


def test_a_row_that_comes_again_is_in_the_half_that_it_was_in() -> None:
    batches, others = small_batches("bert", 2), small_batches("bert", 3, seed=500)
    reports = []
    for held_out in (others, [*others, *others]):
        torch.manual_seed(0)
        reports.append(fitted("bert", batches, held_out)[1])
    for once, twice in zip(*(report.sites for report in reports), strict=True):
        # Shrinkage depends on the number of rows.
        assert twice.correlation_before == pytest.approx(once.correlation_before, abs=0.02)
        assert twice.correlation_after == pytest.approx(once.correlation_after, abs=0.02)


@pytest.mark.parametrize("environments", [False, True])
def test_sequences_without_a_label_do_not_count(environments: bool) -> None:
    batches, others = small_batches("bert", 2), small_batches("bert", 4, seed=500)
    if environments:
        others = [batch | {"concept_environments": torch.arange(16) + 16 * n} for n, batch in enumerate(others)]
    unlabelled = [batch | {"concept_labels": torch.full((16,), -100)} for batch in others[2:]]
    report = fitted("bert", [*batches, *unlabelled], [*others[:2], *unlabelled])[1]
    assert report.examples == report.eval_examples == 32 and not report.eval_fitted
    assert report.eval_environments == (32 if environments else None)
    line = report["last_hidden_state"]
    assert line.interval_before == correlation_interval(line.correlation_before, 32)


def test_images_are_rows_too() -> None:
    batches = small_batches("vit", 2)
    assert fitted("vit", batches, batches[:1])[1].eval_fitted == 16


def test_rows_of_any_inputs_are_noticed() -> None:
    inputs, concept = torch.randn(16, 10, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2
    model = get_peft_model(nn.Sequential(nn.Linear(10, 8)), ConceptErasureConfig(labels=LABELS, target_modules=["0"]))
    batch = {"input": inputs + concept[:, None], "concept_labels": concept}
    with pytest.warns(UserWarning, match="16 of the 16 rows of eval_batches"):
        assert fit_concept_erasure(model, [batch], eval_batches=[batch], progress=False).eval_fitted == 16


def test_one_text_beside_other_images_is_another_row() -> None:
    ids, pixels = torch.full((4, 3), 7), torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    seen = hashes_of({"input_ids": ids, "pixel_values": pixels})
    assert len(set(seen)) == 4
    numbered = {"input_ids": ids, "idx": torch.arange(4)}  # other keys of a batch do not make other rows
    assert len(set(hashes_of(numbered))) == 1
    patches = {"input_ids": ids, "pixel_values": torch.arange(12.0).reshape(6, 2)}  # those of all images, in one list
    rows = hashes_of(patches)
    assert len(rows) == 4 and hashes_of(patches) == rows
    assert not set(hashes_of(patches | {"pixel_values": torch.zeros(6, 2)})) & set(rows)


def test_a_report_without_held_out_rows_says_that_its_figures_are_on_the_fitted_ones() -> None:
    _, report, _ = fitted("bert", small_batches("bert", 2))
    assert "All figures are on fitted rows (all of 32)" in repr(report)


def test_plot_verification_and_saved_adapter_say_so(tmp_path: Path) -> None:
    batches = small_batches("bert", 2)
    model, report, _ = fitted("bert", batches, batches, pool="mean")
    assert "on fitted rows (all of 32)" in report.plot().axes[0].get_title()
    assert "pool='mean'" in report.plot().axes[0].get_title()
    text = str(verify_adapter(model, NAME))
    assert "fitted rows (all of 32)" in text and "pool='mean' (BertModel has no head that reads" in text
    model.save_pretrained(tmp_path)
    other = ARCHITECTURES["bert"].build()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "concept_erasure" not in k})
    other.load_adapter(str(tmp_path), adapter_name=NAME)
    assert other.peft_config[NAME].provenance["measured_on"] == "fitted rows (all of 32)"
    assert report.to_pandas().attrs["measured_on"] == "fitted rows (all of 32)"


def test_leakage_is_a_magnitude_within_its_interval() -> None:
    batches, others = small_batches("bert", 3), small_batches("bert", 4, seed=500)
    model, report, _ = fitted("bert", batches, others)
    for line in report.sites:
        for value, ends in (
            (line.correlation_before, line.interval_before), (line.correlation_after, line.interval_after),
        ):  # fmt: skip
            assert (
                value is not None and ends is not None and 0 <= ends[0] <= value <= ends[1] <= 1 and ends[0] < ends[1]
            )
    frame = report.to_pandas()
    assert {"interval_before", "interval_after"} <= set(frame.columns) and (frame["correlation_after"] >= 0).all()
    last = report["last_hidden_state"]
    assert last.interval_before is not None and last.interval_after is not None
    assert f"{last.correlation_before:.3f} [{last.interval_before[0]:.2f}, {last.interval_before[1]:.2f}]" in repr(
        report
    )
    text = str(verify_adapter(model, NAME))
    assert f" → {last.correlation_after:.3f} (95 %: [" in text
    assert f"→ [{last.interval_after[0]:.2f}, {last.interval_after[1]:.2f}])" in text
    # On fitted rows the covariances of the two halves are opposite, so the leakage is at most 0.
    assert fitted("bert", batches, batches)[1]["last_hidden_state"].correlation_after == 0
