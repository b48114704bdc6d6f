"""The report says what the results say, and can be looked at."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smolvla_edge.benchmarks import page
from smolvla_edge.benchmarks.cli import app
from smolvla_edge.benchmarks.report import sections, text
from smolvla_edge.core.errors import BenchError, ResultError
from support.paths import DATA

pytest.importorskip("matplotlib")
RESULTS = [
    DATA / "results" / f"{kind}.json" for kind in ("latency", "accuracy", "frontier", "control")
]


class Page(HTMLParser):
    """Its tags with their attributes, and the cells: [tag, field or None, text]."""

    def __init__(self, html):
        super().__init__()
        self.cells, self.tags, self._open = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        field = dict(attributes).get("data-field")
        self._open = field is not None or tag == "td"
        if self._open:
            self.cells.append([tag, field, ""])

    def handle_data(self, data):
        if self._open:
            self.cells[-1][2] += data

    def handle_endtag(self, tag):
        self._open = False


@pytest.fixture(scope="module")
def found():
    return sections(RESULTS)


@pytest.fixture(scope="module")
def html(found):
    return page.html(found)


def field_of(pointer):
    """An independent reader of FILE#/json/pointer."""
    file, _, path = pointer.partition("#")
    value = json.loads(Path(file).read_text())
    for part in path.split("/")[1:]:
        value = (
            value[int(part)]
            if isinstance(value, list)
            else value[part.replace("~1", "/").replace("~0", "~")]
        )
        if value is None:
            break
    return value


def says(shown, value):
    if isinstance(value, bool) or value in (None, []):
        return shown == {True: "yes", False: "no"}.get(
            value if isinstance(value, bool) else None, "-"
        )
    if isinstance(value, int | float):
        return float(shown) == pytest.approx(value, rel=6e-3)
    return shown == (value if isinstance(value, str) else "; ".join(value))


def edited(tmp_path, kind, **fields):
    result = json.loads((DATA / "results" / f"{kind}.json").read_text()) | fields
    path = tmp_path / f"{kind}.json"
    path.write_text(json.dumps(result))
    return path


def test_every_number_is_the_field_that_it_names(html):
    cells = Page(html).cells
    traced = [(field, shown) for _, field, shown in cells if field]
    assert len(traced) > 300
    assert [(field, shown) for field, shown in traced if not says(shown, field_of(field))] == []
    labels = {shown for _, field, shown in cells if not field}
    assert {
        "full-fp32-cpu",
        "prefix",
        "shoulder_pan",
        "int8, 1 cameras, 2 steps",
        "60 Hz",
    } <= labels
    assert not any(re.fullmatch(r"[\d.e+-]+", label) for label in labels)


def test_each_result_comes_with_its_command_and_its_machine(html):
    fields = {field for _, field, _ in Page(html).cells}
    for path in RESULTS:
        assert {
            f"{path}#/{name}" for name in ("command", "made", "machine/cpu", "machine/load")
        } <= fields


def test_markdown_and_json_have_the_tables_of_the_page(found, html):
    tables = [
        section["table"]
        for section in json.loads(page.as_json(found))["sections"]
        if section["table"]
    ]
    in_json = [
        ["td", cell["field"], cell["text"]]
        for table in tables
        for row in table["rows"]
        for cell in row
    ]
    assert [cell for cell in Page(html).cells if cell[0] == "td"] == in_json
    lines = [line for line in page.markdown(found).splitlines() if line.startswith("| ")]
    assert len(lines) == sum(1 + len(table["rows"]) for table in tables)  # none is wrapped
    assert any(re.match(r"\| full-fp32-cpu / LeRobot float32 +\| 2.4", line) for line in lines)


def test_a_runner_too_noisy_for_numbers_gets_the_sentence_and_no_stages(found):
    chunk = next(s for s in found if s.heading == "Milliseconds per chunk")
    assert [len(row) for row in chunk.table.rows] == [7, 7, 7, 2]
    assert chunk.table.rows[-1][1].text.startswith("too noisy to say: ")
    assert "too noisy to say<" in chunk.plot()
    ratios = next(s for s in found if s.heading == "Speed ratio in each turn")
    assert {len(row) for row in ratios.table.rows if "int8" in row[0].text} == {2}
    assert {len(row) for row in ratios.table.rows if "int8" not in row[0].text} == {4}
    assert "too noisy to say<" in ratios.plot()
    assert [s.heading for s in found if "each stage:" in s.heading] == [
        "Milliseconds of each stage: full-fp32-cpu"
    ]


def test_numbers_have_three_digits_or_are_whole():
    assert [text(x) for x in (0.0791234, 1.0, 99.96, 1559.6, 48, 485000000000, 1e-6, True, None, [])] == [
        "0.0791", "1", "100", "1560", "48", "4.85e+11", "1e-06", "yes", "-", "-"
    ]  # fmt: skip


def test_the_page_needs_nothing_else_and_names_are_only_text(tmp_path):
    raw = json.loads(RESULTS[0].read_text())
    evil = "</p><script src=//x>alert(1)</script>|{0}$a_b$"
    runners = [raw["runners"][2] | {"name": evil, "note": evil}]
    found = sections([edited(tmp_path, "latency", runners=runners, ratios=[])])
    html = page.html(found)
    parsed = Page(html)
    assert "script" not in parsed.tags
    assert parsed.tags.count("svg") == 2 and "#fe000" not in html
    assert ["td", None, evil] in parsed.cells
    assert html.count("|{0}$a_b$</text>") == 1
    assert not re.search(r"@import|url\((?!#)|\b(src|href)=\"(?!#)", html)
    assert f"| {evil.replace('|', chr(92) + '|')} |" in page.markdown(found)


@pytest.mark.parametrize("change", ["zero errors", "nothing measured"])
def test_results_at_their_edges_are_drawn(tmp_path, change):
    if change == "zero errors":
        raw = json.loads(RESULTS[1].read_text())["comparisons"][:1]
        for joint in raw[0]["joints"]:
            joint |= {
                "p50": 0.0,
                "p99": 0.0,
                "max": 0.0,
                "ticks": None,
                "spread": 0.0,
                "share": 0.0,
            }
        path = edited(tmp_path, "accuracy", comparisons=[raw[0] | {"drift": [0.0] * 50}])
    else:
        raw = json.loads(RESULTS[3].read_text())["loops"][0]
        nothing = {
            name: None
            for name, value in raw.items()
            if isinstance(value, dict) and name != "counts"
        }
        path = edited(tmp_path, "control", loops=[raw | nothing | {"queued": []}])
    assert "<svg" in page.html(sections([path]))


def test_a_frontier_too_noisy_to_draw_still_has_its_table(tmp_path):
    cells = [cell | {"noise": "too noisy"} for cell in json.loads(RESULTS[2].read_text())["cells"]]
    html = page.html(sections([edited(tmp_path, "frontier", cells=cells, recommended=None)]))
    assert "<svg" not in html and html.count("too noisy</td>") > len(cells)
    assert '/cells/0/worst">1.9</td>' in html


@pytest.mark.parametrize(
    ("passed", "said"), [(True, "The bundle meets the gate."), (False, "The bundle fails the gate")]
)
def test_the_gate_is_told_in_words(tmp_path, passed, said):
    found = sections([edited(tmp_path, "accuracy", passed=passed)])
    assert any(cell.text.startswith(said) for cell in found[1].sentences)


def test_the_command_writes_page_markdown_and_tables(tmp_path):
    output = tmp_path / "latency.html"
    done = CliRunner().invoke(app, ["report", str(RESULTS[3]), "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latency.html",
        "latency.md",
        "latency.tables.json",
    ]
    assert output.read_text() == page.html(sections(RESULTS[3:]))
    wrong = CliRunner().invoke(app, ["report", str(RESULTS[0]), "--output", str(RESULTS[0])])
    assert isinstance(wrong.exception, BenchError) and "ends in .html" in str(wrong.exception)
    missing = CliRunner().invoke(app, ["report", str(tmp_path / "nothing.json")])
    assert isinstance(missing.exception, ResultError)


@pytest.fixture
def chromium(tmp_path, html):
    """(arguments) -> stdout, stderr of headless Chromium on the page."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine")
    file = tmp_path / "report.html"
    file.write_text(html)

    def start(*arguments):
        line = [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--v=0",
        ]
        line += [
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=900,1400",
            *arguments,
            file.as_uri(),
        ]
        done = subprocess.run(line, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode(), done.stderr.decode()

    return start


def test_chromium_shows_the_same_cells_without_an_error(chromium, html):
    shown, said = chromium("--dump-dom")
    assert Page(shown).cells == Page(html).cells
    assert Page(shown).tags.count("svg") == 8
    assert "CONSOLE" not in said


def test_chromium_draws_it_in_both_themes(chromium, tmp_path):
    from PIL import Image

    lightness = []
    for dark in (0, 1):
        chromium(
            f"--screenshot={tmp_path / 'page.png'}",
            f"--blink-settings=preferredColorScheme={1 - dark}",
        )
        with Image.open(tmp_path / "page.png") as picture:
            lightness.append(
                [picture.convert("L").getpixel((2, 2)), *picture.convert("L").getextrema()]
            )
    assert lightness[0][0] > 240 and lightness[1][0] < 40
    assert all(low < 50 and high > 220 for _, low, high in lightness)
