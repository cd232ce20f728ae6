"""The report is one file for everyone: nothing is fetched; it is readable in light and dark, wide, narrow and aloud."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_erasure.evaluation import report
from hf_erasure.evaluation.results import OTHER
from tests.evaluation.browser import Browser, chromium
from tests.evaluation.material import made_up, saved

# Elements without an end tag.
VOID = {"meta", "br", "hr", "img", "input", "link"}
# WCAG 2.2, 1.4.3, asks for this of text. Marks need only 3 (1.4.11), but have it too.
LEAST_CONTRAST = 4.5


class Reader(HTMLParser):
    """Checks that every element is closed, and keeps elements and headings for the tests."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    return report.html_page(made_up())


def test_it_is_well_formed_and_loads_nothing(page: str) -> None:
    reader = Reader(page)
    assert page.startswith("<!doctype html>")
    # Addresses may appear as text but must not be fetched; references are to elements of the page.
    assert not reader.of("script") + reader.of("link") + reader.of("img") + reader.of("iframe")
    ids = {f"#{attributes['id']}" for _, attributes in reader.elements if "id" in attributes}
    for _, attributes in reader.elements:
        assert not {"src", "srcset", "data", "onload"} & set(attributes)
        assert {attributes[name] for name in ("href", "xlink:href") if name in attributes} <= ids
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= ids
    assert "@import" not in page


def test_text_from_outside_is_escaped(page: str) -> None:
    assert "a &lt;model&gt;" in page and "a <model>" not in page
    assert "leakage &lt;of&gt; &amp; gender" in page


def test_headings_tables_and_drawings_can_be_heard(page: str) -> None:
    reader = Reader(page)
    assert reader.headings[0] == 1 and reader.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(reader.headings, reader.headings[1:], strict=False))
    assert len(reader.of("caption")) == len(reader.of("table")) >= 2
    assert {attributes.get("scope") for attributes in reader.of("th")} == {"row", "col"}
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    drawings = reader.of("svg")
    # Frontiers of two biases, depth, a plane for each of three entries, shifts, neuron, bars of three measures.
    assert len(drawings) == 2 + 1 + 3 + 1 + 1 + 3
    for drawing in drawings:
        assert drawing["role"] == "img" and len(str(drawing["aria-label"]).partition(". ")[2]) > 10


def test_what_is_drawn_is_text_in_the_colours_of_the_page(page: str) -> None:
    words = set(re.findall(r"<text[^>]*>([^<]*)</text>", page))
    # The words are values, names and the unit of an axis.
    assert {"0.400", "0.100", "base", "together", "female", "P(she) / (P(she) + P(he))"} <= words
    svg = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", svg)
    assert {"var(--fg)", "var(--muted)", "var(--rule)", "var(--s0)", "var(--s3)"} <= set(
        re.findall(r"var\([^)]*\)", svg)
    )


def test_entries_differ_by_more_than_colour() -> None:
    styles = [report._series_style(series) for series in range(len(report.MARKERS))]
    for name in ("marker", "linestyle"):
        assert len({style[name] for style in styles}) == len(styles)


def test_text_with_signs_of_formulas_and_in_any_script_is_drawn_as_it_is(recwarn: pytest.WarningsRecorder) -> None:
    results = made_up()
    odd = "職業 $x_{ <b> $"
    results.entries[-1]["name"] = odd
    for parts in (results.values, results.depth["gender"], results.embedding, results.shifts):
        parts[odd] = parts.pop("together")
    page = report.html_page(results)
    assert "could not be drawn" not in page and "職業 $x_{ &lt;b&gt; $</text>" in page
    assert not recwarn


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_known() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_in_light_and_dark(page: str, dark: bool) -> None:
    schemes = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    assert len(schemes) == 2
    colours = dict(re.findall(r"(--\w+): (#[0-9a-f]{6})", schemes[dark]))
    text = [name for name in colours if name not in ("--bg", "--panel", "--rule")]
    assert len(text) == 11
    for name in text:
        for ground in ("--bg", "--panel"):
            assert contrast(colours[name], colours[ground]) >= LEAST_CONTRAST, (name, ground)


def test_every_colour_that_is_used_is_defined(page: str) -> None:
    assert set(re.findall(r"var\((--\w+)\)", page)) <= set(re.findall(r"(--\w+):", page))


def test_results_survive_the_file(tmp_path: Path) -> None:
    results = made_up()
    data, page = report.write(results, tmp_path)
    again = saved(tmp_path)
    assert again == results
    assert data.read_text(encoding="utf-8") == again.to_json()
    assert page.read_text(encoding="utf-8") == report.html_page(again)


def test_better_and_worse_are_said_where_an_interval_leaves_the_bases_value_out() -> None:
    results = made_up(5)
    leak, crows, lms = results.measures
    # 0.40 ± 0.05, then 0.25, 0.10, −0.05, −0.20: a probe below the majority reads nothing, which does no harm.
    assert [results.verdict(name, leak) for name in results.names] == ["", *["better"] * 4]
    # 60 ± 5, then 57, 54, 51, 48; the ideal is 50.
    assert [results.verdict(name, crows) for name in results.names] == ["", "", "better", "better", "better"]
    assert {results.verdict(name, lms) for name in results.names} == {""}  # no interval, no verdict
    results.values["together"]["crows"] = {"value": 70.0, "interval": [61.0, 79.0]}
    assert results.verdict("together", crows) == "worse"
    assert results.frontiers()[0]["points"][-1] == {"name": "together", "bias": 0.0, "capability": 76.0}


def test_measures_of_another_concept_are_not_listed_as_bias() -> None:
    results = made_up(4)
    leak, crows, _ = results.measures
    leak["concept"], crows["concept"] = "gender", "stereotypes"

    def headings(*concepts: str | None) -> dict[str, list[str]]:
        for entry, concept in zip(results.entries[1:], concepts, strict=False):
            entry.update(adapters=[entry["name"]], concepts=[concept])
        return {title: [measure["key"] for measure in group] for title, group in results.groups()}

    paid = {"Capability kept": ["lms"]}
    apart = {"Bias: gender": ["leak"], "Bias: stereotypes": ["crows"]}
    assert headings() == apart | paid  # the base alone
    assert headings("gender") == {"Bias: gender": ["leak"], OTHER: ["crows"]} | paid
    assert [panel["bias"]["key"] for panel in results.frontiers()] == ["leak"]
    page, table = report.html_page(results), results.table()
    for text in (page, table):
        assert text.index("Bias: gender") < text.index(OTHER) < text.index("CrowS-Pairs, % stereotype")
    assert headings("race") == {OTHER: ["leak", "crows"]} | paid
    assert results.frontiers() == []
    assert headings("race", "stereotypes") == {"Bias: stereotypes": ["crows"], OTHER: ["leak"]} | paid
    assert headings("race", None) == apart | paid  # another library's adapter does not name its concept


def test_many_entries_are_drawn_too() -> None:
    reader = Reader(report.html_page(made_up(entries=8)))
    assert len(reader.of("svg")) == 2 + 1 + 8 + 1 + 1 + 3


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    chromium()
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_browser(browser: Browser, page: str, tmp_path: Path, width: int, dark: bool) -> None:
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    browser.open(path, width=width, dark=dark)
    assert browser.requests == [path.resolve().as_uri()]
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # Parts of the page do not scroll either: nothing is wider than the element around it.
    inner = "[...document.querySelectorAll('main *:not(svg *, thead, thead *)')].filter(e => e.clientWidth && "
    inner += "e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 99))"
    assert browser.evaluate(inner) == []
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 22, 27)" if dark else "rgb(255, 255, 255)")
    # Words stay within their drawing, and are large enough: a telephone shows a figure in 340 pixels.
    outside = "[...document.querySelectorAll('svg text')].filter(t => {const a = t.getBoundingClientRect(), "
    outside += "b = t.ownerSVGElement.getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1 || "
    outside += "a.top < b.top - 1 || a.bottom > b.bottom + 1}).map(t => t.textContent)"
    assert browser.evaluate(outside) == []
    scale = "Math.min(...[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width / 360))"
    assert browser.evaluate(scale) > 0.85
    role = "[...document.querySelectorAll('td')].every(e => e.getAttribute('role') == 'cell')"
    assert browser.evaluate(role) is True
