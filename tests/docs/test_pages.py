"""Every code block in the README and the documentation is run, or it is checked and names the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import PageError, blocks_of
from tests.docs.running import run_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
WITH_BLOCKS = [page for page in PAGES if re.search(r"^ *(```|~~~)", page.read_text(encoding="utf-8"), re.MULTILINE)]


def _parameter(page: Path) -> object:
    name = str(page.relative_to(ROOT))
    slow = any("slow" in block.directives for block in blocks_of(page))
    return pytest.param(page, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("page", [_parameter(page) for page in WITH_BLOCKS])
def test_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page(page, tmp_path) > 0


BROKEN = {
    "an import that is not there": "```python\nfrom hf_erasure import no_such_name\n```",
    "a keyword that a function has not": (
        "```python\nimport hf_erasure\nhf_erasure.verify_adapter(None, adapter='x')\n```"
    ),
    "a name that was never given": "```python\nprint(model)\n```",
    "a wrong output": "```python\nprint(1)\n```\n<!-- test: output -->\n```\n2\n```",
    "a figure that is far off": "```python\nprint(0.5)\n```\n<!-- test: output within 0.1 -->\n```\n0.65\n```",
    "another word beside a near figure": (
        "```python\nprint('a 0.5')\n```\n<!-- test: output within 0.1 -->\n```\nb 0.5\n```"
    ),
    "a tolerance that is not a number": "```python\nprint(1)\n```\n<!-- test: output near -->\n```\n1\n```",
    "a block that is not run, with a call that cannot be": (
        "<!-- test: not run: it takes 8 GPUs -->\n```python\nfrom hf_erasure import ConceptErasureConfig\n"
        "ConceptErasureConfig(label=['a', 'b'])\n```"
    ),
    "an option that a command has not": "```bash\nhf-erasure fit recipe.yaml --process 8\n```",
    "an argument too few": "```bash\nhf-erasure merge MODEL ADAPTER\n```",
    "a command that is not there": "```bash\nhf-erasure fitt recipe.yaml\n```",
    "an override that a recipe has not": "```bash\nhf-erasure fit recipes/minilm-gender/recipe.yaml fit.pol=cls\n```",
    "a script that is not there": "```bash\npython recipes/no_such/study.py\n```",
    "a target that is not there": "```bash\nmake nothing\n```",
    "an extra that is not there": "```bash\npip install 'hf-erasure[everything]'\n```",
    "a key that a recipe has not": "```yaml\nmodel: m\nconcept: c\nlabels: [a, b]\noutput: o\nfits: {}\n```",
    "a command in a block without a language": "```\nhf-erasure fit recipe.yaml\n```",
    "a language that nothing tests": "```perl\nprint 1\n```",
    "a set-up that is not there": "<!-- test: needs a_miracle -->\n```python\n1\n```",
    "a directive that means nothing": "<!-- test: skip -->\n```python\n1\n```",
    "a directive before no block": "<!-- test: run -->\n\nText.\n",
    "a block not run without a reason": "<!-- test: not run -->\n```python\n1\n```",
    "a command that fails when it is run": "<!-- test: run -->\n```bash\nhf-erasure check .\n```",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_block_is_found(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{BROKEN[what]}\n", encoding="utf-8")
    with pytest.raises((PageError, NameError)):
        run_page(page, tmp_path)


FROM_THE_INDEX = re.compile(r"pip install (?:-U )?'?hf-erasure(?:\[demo\])?'?(?![\w\[-])")
SAYS_HOW = [*PAGES, *sorted((ROOT / "docs").rglob("*.ipynb")), *sorted((ROOT / "model_cards").rglob("*.md"))]


@pytest.mark.parametrize("page", SAYS_HOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_an_install_line_is_true_before_the_package_is_on_the_index(page: Path) -> None:
    for line in page.read_text(encoding="utf-8").splitlines():
        assert not FROM_THE_INDEX.search(line) or "index" in line, f"{page}: {line}"


@pytest.mark.parametrize(
    "card", sorted((ROOT / "model_cards/examples").glob("*/README.md")), ids=lambda c: c.parent.name
)
def test_the_first_code_of_a_card_imports_the_package(card: Path) -> None:
    assert blocks_of(card)[0].code.startswith("import hf_erasure")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_benchmarks_have_the_options_that_a_page_gives_them(page: Path) -> None:
    for name, options in re.findall(r"python (benchmarks/\w+\.py)([^`\n]*)", page.read_text(encoding="utf-8")):
        source = (ROOT / name).read_text(encoding="utf-8")
        missing = [one for one in re.findall(r"--[\w-]+", options) if f'add_argument("{one}"' not in source]
        assert not missing, f"{name} has no {missing}"


def test_figures_may_differ_by_what_the_page_says(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint('a 0.5')\n```\n<!-- test: output within 0.1 -->\n```\na 0.55\n```\n", encoding="utf-8"
    )
    assert run_page(page, tmp_path) == 2


def test_a_block_that_fails_names_the_line_of_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\na = 1\nb = a / 0\n```\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError) as found:
        run_page(page, tmp_path)
    last = found.traceback[-1]
    assert (Path(last.path), last.lineno + 1) == (page, 5)
