"""The report page: complete, self-contained, and drawn from what the run folder holds."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from errors import UserError
from eval.charts import bar_chart, confusion_chart, line_chart, thin
from eval.examples import choose
from eval.page import DARK, LIGHT, to_html
from eval.report import Options, Run, evaluate_run, main, write_report
from models import create_model, save_model
from tests.conftest import Command

VOID = {"meta", "img"}


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
        if tag not in VOID:
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
    assert not re.search(r"""(src|href)=["'](?!data:|#)|url\((?!#)|@import""", html)
    # summary: best, last, evaluated, steps, parameters
    text = re.sub(r"<[^>]*>", " ", html)
    for word in (
        "40.00",
        "35.00",
        "52.00",
        "60.00 ",
        "3,719,284",
        "TransKDBase",
        "12.34",
        "teacher 61.0",
    ):
        assert word in text, word
    assert "A &lt; B" in html and "Few &lt;scenes&gt;" in html and "&lt;wall&gt;" in html
    # every mark says what it stands for, in its run's colour; an absent class has no bar
    for mark, color in (
        ("alone, step 4: 40 %", 0),
        ("distilled &amp; more, step 6: 52 %", 1),
        ("distilled &amp; more: 0.5 at step 6", 1),
        ("&lt;wall&gt;, teacher: 30 %", 2),
    ):
        assert re.search(
            rf"<title>{mark}</title>((?!<title>).)*var\(--c{color}\)", html, re.DOTALL
        ), mark
    assert "road, alone: 35 %" in html and "&lt;wall&gt;, alone" not in html
    assert not re.search("|".join({*LIGHT.values(), *DARK.values()}), html.split("</style>", 1)[1])
    assert "Confusion matrix of alone: its evaluation has no counts" in text
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
    for content, says in (
        ("half", r"eval\.json is not JSON"),
        ("[0.3]", "no JSON object"),
        ('{"per_image": {}}', "has no mean_iou"),
        ('{"mean_iou": 0.3, "per_class": [0.3]}', "has no per_class"),
    ):
        (run.folder / "eval.json").write_text(content)
        with pytest.raises(UserError, match=says):
            run.evaluation()


def test_an_evaluation_goes_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copied run shows its own weights, and no figures from before its training went on."""
    run = write_run(tmp_path / "copy", "student", [0.2, 0.4])
    (run.folder / "options.json").write_text(
        json.dumps({"dataset": "cityscapes", "datadir": "x", "height": 64})
    )
    save_model(create_model("segformer_b0"), run.folder / "student.safetensors", step=4)
    written = {"mean_iou": 0.3, "weights": str(tmp_path / "first" / "student.safetensors")}
    written |= {"subset": "test", "protocol": "full"}
    evaluated: list[tuple[Path | None, str, str]] = []
    monkeypatch.setattr(
        "eval.report.score", lambda _, o: evaluated.append((o.weights, o.subset, o.protocol))
    )
    for step, mean, anew in ((4, 0.3, False), (None, 0.3, False), (2, 0.4, True)):
        (run.folder / "eval.json").write_text(json.dumps(written | {"step": step}))
        found = run.evaluation()
        assert found is not None and found["mean_iou"] == mean
        assert anew or found["weights"] == str(run.folder / "student.safetensors")
        evaluate_run(run, Options((run.folder,)))
        assert bool(evaluated) == anew
    assert evaluated == [(run.folder / "student.safetensors", "test", "full")]  # as before
    html = write_report(tmp_path / "page.html", title="T", runs=[run]).read_text(encoding="utf-8")
    assert "eval.json of copy: the training went on after it" in html


def test_damaged_records_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "student", [0.2, 0.4])
    path = run.folder / "metrics.jsonl"
    damage = b'\n[1, 2]\n7\n{"event": "val", "mean_iou": 0.9}\n{"event": "val", "step": 5, "mean_iou": "x"}\n'
    damage += b'{"step": 9}\n{"event": "start", "step": 0}\n\xff\xfe\x00\n\x00\x00\x00\x00\n'
    path.write_bytes(damage + path.read_bytes() + damage)
    (run.folder / "eval.json").write_text(
        '{"mean_iou": 0.3, "per_image": {"a": 0.3}}'
    )  # of an unknown data set
    assert run.curve("val", "mean_iou") == [(2, 0.2), (4, 0.4)]
    main(Options((run.folder,), tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert "Worst and best images of run" in text and "40.00" in text
    (run.folder / "options.json").write_text("[]")
    with pytest.raises(UserError, match=r"options\.json holds no JSON object"):
        main(Options((run.folder,), tmp_path / "page.html"))


def test_command(scenes: Path, tmp_path: Path, command: Command) -> None:
    """Two runs are evaluated and reported with their worst and best images, a third one that has lost its data."""
    for seed, name in enumerate(("first", "second", "third")):
        run = write_run(tmp_path / name, "student", [0.25], seed=seed)
        torch.manual_seed(seed)
        save_model(create_model("segformer_b0"), run.folder / "student.safetensors")
        described = {
            "network": "student",
            "dataset": "cityscapes",
            "datadir": str(scenes),
            "height": 64,
            "seed": seed,
        }
        (run.folder / "options.json").write_text(json.dumps(described))
    gone = {
        "dataset": "cityscapes",
        "datadir": "nowhere",
        "subset": "val",
        "height": 64,
        "weights": "gone",
    }
    images = [
        path.relative_to(scenes).as_posix() for path in sorted(scenes.glob("leftImg8bit/val/*/*"))
    ]
    scores = {"mean_iou": 0.5, "per_class": {"road": 0.5}, "per_image": dict.fromkeys(images, 0.5)}
    (tmp_path / "third" / "eval.json").write_text(json.dumps(gone | scores))

    flags = ("--output", tmp_path / "page.html", "--evaluate", "--examples", 1)
    runs = [tmp_path / name for name in ("first", "second", "third")]
    done = command("-m", "eval.report", *runs, *flags)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "page.html") in done.stdout
    page = Page((tmp_path / "page.html").read_text())
    text = re.sub(r"<[^>]*>", " ", (tmp_path / "page.html").read_text())
    first = json.loads((tmp_path / "first" / "eval.json").read_text())
    assert set(first["per_image"]) == set(images) and first["weights"] == str(
        tmp_path / "first/student.safetensors"
    )
    assert (
        "no folder nowhere" in text
        and "Confusion matrix of third" in text
        and "first, % of each true class" in text
    )
    panels = [str(image["alt"]) for image in page.all("img")]
    titles = [
        [title.split(":")[0] for title in panels[i : i + 4]] for i in range(0, len(panels), 4)
    ]
    assert titles == 2 * [["image", "truth", "first", "second"]]
    shown = [float(title.split(":")[1]) for title in panels if "first" in title]
    assert shown[0] <= shown[1] and {
        f"{100 * score:.2f}" for score in first["per_image"].values()
    } >= {f"{shown[0]:.2f}"}
    plots = {path.name for path in (tmp_path / "page_plots").iterdir()}
    assert plots == {
        *("miou.png", "loss_total.png", "loss_ce.png", "loss_hcl.png", "iou_per_class.png"),
        *("confusion_first.png", "confusion_second.png", "01_worst.png", "02_best.png"),
    }
    for name in plots:
        assert Image.open(tmp_path / "page_plots" / name).width > 300


def test_mistakes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "student", [0.25])
    for options, says in (
        (Options(()), "no run given"),
        (Options((tmp_path,)), "metrics.jsonl is missing"),
        (Options((run.folder, run.folder / "options.json")), "json/metrics.jsonl is missing"),
        (Options((run.folder, tmp_path / "typo"), evaluate=True), "typo/metrics.jsonl is missing"),
        (Options((run.folder,), examples=-1), "--examples"),
        (Options((run.folder,), tmp_path), "is a folder"),
        (Options((run.folder,), Path()), "is a folder"),
        (Options((run.folder,), run.folder / "options.json"), "does not end in .html"),
        (
            Options((run.folder,), tmp_path / "page.html", run.folder / "options.json"),
            "can't make the folder",
        ),
        (
            Options((run.folder,), evaluate=True),
            "has no dataset; evaluate this run by its IoU script",
        ),
    ):
        with pytest.raises(UserError, match=says):
            main(options)


@pytest.mark.parametrize(
    "part",
    [
        {"mean_iou": "0.3"},
        {"per_class": None},
        {"per_class": {"road": "0.3"}},
        {"per_image": {"a": {}}},
        {"conditions": {"fog": 0.3}},
        {"confusion": []},
        {"confusion": [[1]]},
        {"confusion": [[1, "2"]]},
    ],
    ids=str,
)
def test_an_evaluation_of_another_form(part: dict[str, Any], tmp_path: Path) -> None:
    """Half of it may be right: the key that is not is named."""
    run = write_run(tmp_path / "run", "student", [0.25])
    whole = {
        "mean_iou": 0.3,
        "per_class": {"road": 0.3},
        "per_image": {"a": None},
        "confusion": [[1, 2]],
    }
    (run.folder / "eval.json").write_text(json.dumps(whole))
    assert run.eval_json() == whole
    (run.folder / "eval.json").write_text(json.dumps(whole | part))
    (key,) = part
    with pytest.raises(
        UserError, match=rf"eval\.json has no {key} as the IoU scripts write it; remove it"
    ):
        run.eval_json()


def test_worst_and_best_images() -> None:
    one = {"a": 0.1, "b": 0.9, "c": 0.5, "d": None, "e": 0.8}
    two = {"a": 0.9, "b": 0.9, "c": 0.2, "d": 0.0, "f": 0.0}
    assert choose([one], 2) == (["a", "c"], ["b", "e"])
    assert choose([one, two], 1) == (
        ["c"],
        ["b"],
    )  # means 0.35 and 0.9; d, e and f are not scored by both
    assert choose([one, two], 2) == (["c", "a"], ["b"])  # an image is in one list only
    assert choose([one], 0) == ([], []) and choose([], 3) == ([], [])


def marks(svg: str) -> list[str]:
    return re.findall("<title>(.*?)</title>", svg)


def test_charts_show_what_there_is() -> None:
    colors = {"a": 0, "b": 9}
    lines = {"a": [(0, 0.0), (10, 50.0), (20, float("nan"))], "b": []}
    chart = line_chart("x", "X & Y", lines, colors, unit=" %", levels={"teacher": 60}, dots=True)
    assert chart is not None
    assert marks(chart.svg()) == [
        "a: 50 % at step 10",
        "a, step 0: 0 %",
        "a, step 10: 50 %",
        "teacher",
    ]
    (axes,) = chart.figure.axes
    assert axes.get_xlim()[0] == 0 and axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 60
    assert 'aria-label="X &amp; Y"' in chart.svg()
    assert line_chart("x", "X", {"a": []}, colors) is None
    assert bar_chart("x", "X", ["road"], {"a": [None]}, colors) is None


@pytest.mark.parametrize(("width", "height", "color"), [(5.5, 3.15, 3), (6.9, 3.85, 1)])
def test_marks_keep_what_they_refer_to(width: float, height: float, color: int) -> None:
    """Of clip paths and markers some have names of letters and then digits alone, as groups have."""
    points = [(step, float(step)) for step in range(1, 5)]
    chart = line_chart("x", "X", {"a": points}, {"a": color}, dots=True, size=(width, height))
    assert chart is not None
    names, used = (
        set(re.findall(pattern, chart.svg())) for pattern in (r' id="(.+?)"', r'(?:\(|")#(.+?)[)"]')
    )
    assert used and used == names


def test_many_runs_with_long_names(tmp_path: Path) -> None:
    """The ninth has the first one's colour, but not its line; no name is cut off at the picture's edge."""
    names = [f"{index}_{60 * 'x'}" for index in range(9)]
    chart = line_chart(
        "x",
        "X",
        {name: [(0, 1.0), (1, 2.0)] for name in names},
        dict(zip(names, range(9), strict=True)),
    )
    assert chart is not None
    first, ninth = chart.marks[names[0]], chart.marks[names[8]]
    assert first.get_color() == ninth.get_color() and first.get_linestyle() != ninth.get_linestyle()
    pixels = np.asarray(Image.open(chart.save(tmp_path)).convert("L"))
    assert pixels.min() < 100 and pixels[:, [0, -1]].min() == 255


@pytest.mark.parametrize("name", ["_run", "run_$a_$"])
def test_names_of_runs_stand_as_they_are(name: str, tmp_path: Path) -> None:
    charts = (
        line_chart(
            "line", name, {name: [(0, 1.0), (1, 2.0)]}, {name: 0}, levels={name: 1.0}, dots=True
        ),
        bar_chart("bar", name, [name], {name: [1.0]}, {name: 0}),
    )
    for chart in charts:
        assert chart is not None and name in chart.svg()
        chart.save(tmp_path)
        (legend,) = chart.figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [name]


def test_confusion_is_a_share_of_the_true_class(tmp_path: Path) -> None:
    """Classes that don't occur are left out; one that is only predicted comes last, before "ignore"."""
    counts = [[6, 0, 2, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 1], [0, 0, 0, 0, 0]]
    chart = confusion_chart("x", "X", counts, ["road", "wall", "sky", "bus"])
    found = dict(mark.split(": ") for mark in marks(chart.svg()))
    assert list(found)[:4] == ["road as road", "road as sky", "road as wall", "road as ignore"]
    assert (
        found["road as road"] == "75.0 %"
        and found["sky as wall"] == found["sky as ignore"] == "25.0 %"
    )
    assert len(found) == 8 and not any("bus" in name for name in found)
    before = chart.svg()
    assert (
        chart.save(tmp_path) == tmp_path / "x.png"
        and Image.open(tmp_path / "x.png").getpixel((1, 1))[:3] == (255,) * 3
    )
    assert "Rectangle" not in before  # marks lose matplotlib's own names


def test_long_curves_are_averaged() -> None:
    thinned = thin([(x, float(x)) for x in range(1000)], 100)
    assert len(thinned) == 100 and thinned[0] == (9, 4.5) and thinned[-1] == (999, 994.5)


def test_introduction() -> None:
    text = "Two **bold** words, `a<b`.\n\n- one\n- two\n  more\n\n<p>as is</p>"
    assert to_html(text).split("\n", 1)[0] == "<p>Two <b>bold</b> words, <code>a&lt;b</code>.</p>"
    assert "<ul><li>one</li><li>two\n  more</li></ul>" in to_html(text)
    assert to_html(text).endswith("<p>as is</p>") and to_html("") == ""
