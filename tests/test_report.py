"""The report page: complete, self-contained, and drawn from what the run folder holds."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from cli import UserError
from eval.charts import bar_chart, line_chart, thin, ticks
from eval.page import to_html
from eval.report import Run, write_report

REPOSITORY = Path(__file__).resolve().parents[1]
VOID = {"meta", "img", "line", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """Tags with their attributes, and whether every tag that opens closes in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID or tag in ("line", "rect", "circle"):  # these hold their hover title
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def write_run(folder: Path, method: str, scores: list[float], *, seed: int = 0) -> Run:
    folder.mkdir()
    options = {"method": method, "seed": seed, "lr": 6e-5, "parameters": 3719284}
    (folder / "options.json").write_text(json.dumps(options))
    lines = [{"event": "teacher", "epoch": 0, "step": 0, "mean_iou": 0.61}]
    for epoch, score in enumerate(scores, 1):
        for step in (2 * epoch - 1, 2 * epoch):
            losses = {"ce": 3 / step, "hcl": 1 / step, "total": 4 / step}
            lines.append({"event": "train", "epoch": epoch, "step": step, "losses": losses})
        val = {"road": score, "<wall>": None}
        lines.append({"event": "val", "step": 2 * epoch, "mean_iou": score, "per_class": val})
    text = "\n".join(map(json.dumps, lines))
    (folder / "metrics.jsonl").write_text(text + '\n{"event": "val", "st')  # killed while writing
    return Run(folder.name, folder)


def test_page(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "alone", "student", [0.2, 0.4, 0.35]),
        write_run(tmp_path / "distilled & more", "TransKDBase", [0.3, 0.5, 0.52], seed=1),
    ]
    night = {"mean_iou": 0.1234}
    teacher = {"protocol": "full", "mean_iou": 0.6, "per_class": {"road": 0.9, "<wall>": 0.3}}
    picture = Image.new("RGB", (5, 3), (9, 8, 7))
    (tmp_path / "made.png").write_bytes(b"")
    picture.save(tmp_path / "made.png")
    html = write_report(
        tmp_path / "new" / "report.html",
        title="A < B",
        introduction="Few <scenes>.",
        runs=runs,
        evaluations={"teacher": teacher | {"conditions": {"night": night}}},
        pictures=[("night & fog", picture), tmp_path / "made.png"],
    ).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open

    # nothing is fetched
    assert not page.all("link") and not page.all("script")
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import""", html)
    # summary: best, last, evaluated, steps, parameters
    text = re.sub(r"<[^>]*>", " ", html)
    for word in ("40.00", "35.00", "52.00", "60.00 ", "3,719,284", "TransKDBase", "12.34", "teacher 61.0"):
        assert word in text, word
    assert "A &lt; B" in html and "Few &lt;scenes&gt;" in html and "&lt;wall&gt;" in html
    # one colour a run in every chart: mIoU, total, ce, hcl for two runs each
    strokes = [line["stroke"] for line in page.all("polyline")]
    assert strokes == ["var(--c0)", "var(--c1)"] * 4
    bars = [bar["fill"] for bar in page.all("rect")]
    assert bars == ["var(--c0)", "var(--c1)", "var(--c2)", "var(--c2)"]  # no bar for an absent class
    assert "step 4: 40 %" in html and "road, distilled &amp; more: 52 %" in html
    # options that differ, and only those
    assert "<td>seed</td><td>0</td><td>1</td>" in html and "<td>lr</td>" not in html
    # pictures are inside
    for image in page.all("img"):
        data = base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).getpixel((4, 2)) == (9, 8, 7)
    assert [image["alt"] for image in page.all("img")] == ["night & fog", "made"]


def test_resume_counts_a_step_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "student", [0.2, 0.4])
    path = run.folder / "metrics.jsonl"
    again = {"event": "val", "step": 4, "mean_iou": 0.45}
    path.write_text(path.read_text() + "\n" + json.dumps(again) + "\n")
    assert run.curve("val", "mean_iou") == [(2, 0.2), (4, 0.45)]
    assert run.curve("train", "losses", "hcl")[:2] == [(1, 1.0), (2, 0.5)]


def test_eval_json_goes_before_the_last_validation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "student", [0.2, 0.4])
    assert (run.evaluation() or {})["mean_iou"] == 0.4
    (run.folder / "eval.json").write_text('{"mean_iou": 0.3}')
    assert (run.evaluation() or {})["mean_iou"] == 0.3
    (run.folder / "eval.json").write_text("half")
    with pytest.raises(UserError, match=r"eval\.json is not JSON"):
        run.evaluation()


def test_command(tmp_path: Path) -> None:
    run = write_run(tmp_path / "first", "student", [0.25])
    call = [sys.executable, "-m", "eval.report", str(run.folder), "--output", "page.html"]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "25.00" in (tmp_path / "page.html").read_text() and "page.html" in done.stdout
    call[3] = str(tmp_path)
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "metrics.jsonl is missing" in done.stderr


def test_curves_start_and_end_where_the_data_does() -> None:
    html = line_chart({"a": [(0, 0.0), (10, 50.0), (20, float("nan"))]}, {"a": 0}, label="x", size=(380, 240))
    assert "nan" not in html
    points = re.search(r'<polyline points="([^"]*)"', html)
    assert points is not None
    (x0, y0), (x1, y1) = ([float(v) for v in p.split(",")] for p in points[1].split())
    assert (x0, x1) == (52, 380 - 12) and y0 == 240 - 42 and y1 == 10  # left, right, bottom, top
    assert line_chart({"a": []}, {"a": 0}, label="x") == ""
    assert bar_chart(["road"], {"a": [None]}, {"a": 0}, label="x") == ""


@pytest.mark.parametrize(
    ("high", "expected"),
    [
        (62.0, [0, 20, 40, 60, 80]),
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (2975.0, [0, 1000, 2000, 3000]),
    ],
)
def test_ticks(high: float, expected: list[float]) -> None:
    assert ticks(0, high) == expected


def test_long_curves_are_averaged() -> None:
    thinned = thin([(x, float(x)) for x in range(1000)], 100)
    assert len(thinned) == 100 and thinned[0] == (9, 4.5) and thinned[-1] == (999, 994.5)


def test_introduction() -> None:
    text = "Two **bold** words, `a<b`.\n\n- one\n- two\n  more\n\n<p>as is</p>"
    assert to_html(text).split("\n", 1)[0] == "<p>Two <b>bold</b> words, <code>a&lt;b</code>.</p>"
    assert "<ul><li>one</li><li>two\n  more</li></ul>" in to_html(text)
    assert to_html(text).endswith("<p>as is</p>") and to_html("") == ""
