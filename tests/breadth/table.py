"""The outcomes for a model type, compared with the table in the documentation."""

from __future__ import annotations

import functools
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests import matrix
from tests.breadth import gradiend, sites, zoo
from tests.breadth.erasure import COLUMNS, FEW, Erasure
from tests.breadth.gradiend import Gradiend
from tests.breadth.outcomes import FAILS, NOT_REACHED, WRONG, Outcomes
from tests.matrix import Found

PAGE = Path(__file__).parents[2] / "docs" / "model-types.md"
TYPES, REASONS, SITES, NOT_BUILT = "Model types", "Reasons", "Default sites", "Not built"
# The most seconds of processor time for a type; most types take two.
_MOST = 90
_REASON = 200  # The largest number of characters of a reason why a type is left out.
Enter = Callable[[str, str, str, str], None]


def check_erasure(model_type: str, enter: Enter, request: pytest.FixtureRequest, everything: bool) -> None:
    """Run the steps of an erasure; record their outcomes, or compare them with the table and the list of sites."""
    try:
        with zoo.at_most(_MOST), tempfile.TemporaryDirectory() as folder:
            model = Erasure(zoo.build(model_type), Path(folder))
            outcomes = model.live(everything)
    except (zoo.NotBuiltError, zoo.TooLongError) as error:
        _leave_out(model_type, error, enter, request)
        return
    found = {column: outcomes.together(column, *steps) for column, steps in COLUMNS.items()}
    found = {column: outcome for column, outcome in found.items() if everything or column in FEW}
    names = sites.collapsed(model.targets)
    enter(SITES, model_type, "sites", "\n".join(names))
    if not request.config.getoption("--matrix"):
        assert names == sites.listed().get(model_type, names)
    _conclude(model_type, found, outcomes, enter, request)


def check_gradiend(model_type: str, enter: Enter, request: pytest.FixtureRequest) -> None:
    """Run the steps of a GRADIEND; record their outcome, or compare it with the table."""
    head = zoo.head_of(model_type)
    needs_sentinels = "t5" in model_type or model_type == "switch_transformers"
    try:
        with zoo.at_most(_MOST), tempfile.TemporaryDirectory() as folder:
            base = zoo.build(model_type, head or zoo.AutoModel)
            outcomes = Gradiend(base, Path(folder), head is not None, needs_sentinels).live()
    except zoo.NotBuiltError as error:
        _leave_out(model_type, error, lambda *_: None, request)  # the reason is recorded for the model without a head
        return
    column = gradiend.COLUMN
    _conclude(model_type, {column: outcomes.together(column, *outcomes.of)}, outcomes, enter, request)


def _leave_out(model_type: str, error: BaseException, enter: Enter, request: pytest.FixtureRequest) -> None:
    told = re.sub(r"/\S*/site-packages/", "…/", " ".join(str(error).split()))  # without install paths
    reason = told[:_REASON].replace("|", "\\|")
    if request.config.getoption("--matrix"):
        enter(NOT_BUILT, model_type, "reason", reason)
    else:
        # A row without these columns is of a type that is built with a head alone.
        is_known = not known().get(model_type, {}).keys().isdisjoint(COLUMNS)
        assert isinstance(error, zoo.NotBuiltError) and not is_known, reason
        pytest.skip(reason)


def _conclude(
    model_type: str, found: dict[str, str], outcomes: Outcomes, enter: Enter, request: pytest.FixtureRequest
) -> None:
    for column, outcome in found.items():
        enter(TYPES, model_type, column, outcome)
        if column in outcomes.reasons:
            enter(REASONS, f"{model_type}, {column}", "reason", outcomes.reasons[column].replace("|", "\\|"))
    if request.config.getoption("--matrix"):
        return  # the run writes the table, so there is nothing to compare with
    told = known().get(model_type, {})
    bad = {
        column: f"{outcome}: {outcomes.reasons.get(column)}"
        for column, outcome in found.items()
        if (outcome != told[column] if column in told else outcome in (WRONG, FAILS, NOT_REACHED))
    }
    assert not bad, f"docs/model-types.md says {told}"


@functools.cache
def known() -> dict[str, dict[str, str]]:
    """Type → column → outcome, from the table in the documentation."""
    between = re.search(rf"<!-- matrix: {TYPES} -->\n(.*?)<!-- end -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in between[1].splitlines() if line]
    if not rows:
        return {}
    columns = rows[0][1:]
    # A cell that a run did not reach is empty.
    return {name: {c: told for c, told in zip(columns, cells, strict=True) if told} for name, *cells in rows[2:]}


def write(cells: Iterable[Found]) -> None:
    """Write the page of the documentation and the list of default sites."""
    order = [*COLUMNS, gradiend.COLUMN]
    found = sorted(cells, key=lambda cell: (cell[1], order.index(cell[2]) if cell[2] in order else 0))
    built = {row for table, row, column, _ in found if table == TYPES and column in COLUMNS}
    sites.write({row: text.splitlines() for table, row, _, text in found if table == SITES})
    matrix.write(PAGE, [cell for cell in found if cell[0] != SITES and (cell[0] != NOT_BUILT or cell[1] not in built)])


if __name__ == "__main__":
    write(matrix.recorded(Path(sys.argv[1])))
