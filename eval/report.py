"""One HTML page about training runs that needs no other file, and its charts as PNG files in a folder beside it.

    python -m eval.report outputs/student_cityscapes outputs/TransKDBase_cityscapes --output report.html
    python -m eval.report outputs/student_cityscapes --evaluate --datadir /data/cityscapes

Results, curves, IoU per class and condition, confusion matrices, the worst and best images, options that differ.

Reads options.json and metrics.jsonl of each run folder, and eval.json where there is one: `--evaluate` makes it, and so
does `eval/eval_…_iou.py --json RUN/eval.json`. Without it the last validation is shown. The worst and best images are
predicted anew with the weights and the data that eval.json names. The page says what it could not show.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import tyro

if __package__ in (None, ""):  # run from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cli import find_device, run
from errors import UserError
from eval.charts import COLORS, LARGE, Chart, bar_chart, confusion_chart, line_chart
from eval.commands import score
from eval.examples import Example, find_examples
from eval.inference import save_png
from eval.metrics import percent
from eval.options import IoUOptions, claim_file, claim_folder
from eval.page import Picture, figure, legend, page, panels, table
from eval.records import EVALUATION, fits, read_records
from files import atomic_write, read_json
from models.checkpoints import read_facts

HTML = ".html"
NEEDED = {"dataset": str, "datadir": str, "height": int}  # of a run's options, for its evaluation


@dataclass(frozen=True)
class Run:
    """A run folder and the name it has on the page."""

    name: str
    folder: Path

    @cached_property
    def options(self) -> dict[str, Any]:
        return read_json(self.folder / "options.json") or {}

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        return read_records(self.folder / "metrics.jsonl")

    def curve(self, event: str, *keys: str) -> list[tuple[float, float]]:
        """(step, value) of an event; a step repeated after a resume counts once, the last time."""
        points: dict[float, float] = {}
        for record in self.records:
            if record.get("event") == event:
                value: Any = record
                for key in keys:
                    value = value.get(key) if isinstance(value, dict) else None
                if value is not None:
                    points[record["step"]] = value
        return sorted(points.items())

    def last(self, event: str) -> dict[str, Any] | None:
        return next((r for r in reversed(self.records) if r.get("event") == event), None)

    def evaluation(self) -> dict[str, Any] | None:
        """eval.json, or else, or if that is outdated, the last validation. Raises UserError as `eval_json`."""
        found = self.eval_json()
        return self.last("val") if found is None or self.outdated(found) else found

    def outdated(self, evaluation: dict[str, Any]) -> bool:
        """Whether the training went on after this evaluation: its weights are of another step now."""
        weights = Path(evaluation.get("weights", ""))
        now = read_facts(weights).get("step") if weights.is_file() else None
        return now is not None and evaluation.get("step") not in (None, now)

    def eval_json(self) -> dict[str, Any] | None:
        """The file, with the weights that lie beside it where it names such: the run may have been moved or copied.

        Raises:
            UserError: the file is none that an IoU script writes.
        """
        path = self.folder / "eval.json"
        evaluation = read_json(path)
        if evaluation is None:
            return None
        wrong = [key for key, value in evaluation.items() if not fits({key: value}, EVALUATION)]
        wrong += [key for key in ("mean_iou",) if key not in evaluation]
        if not wrong and (counts := evaluation.get("confusion")) is not None:
            classes = len(evaluation.get("per_class", ()))
            if not classes or [len(row) for row in counts] != [classes + 1] * classes:
                wrong = ["confusion"]
        if wrong:
            raise UserError(
                f"{path} has no {wrong[0]} as the IoU scripts write it; remove it, or write it by their --json"
            )
        beside = self.folder / Path(evaluation.get("weights", "")).name
        return evaluation | {"weights": str(beside)} if beside.is_file() else evaluation


def write_report(
    path: Path | str,
    *,
    title: str,
    introduction: str = "",
    runs: Sequence[Run] = (),
    evaluations: Mapping[str, dict[str, Any]] | None = None,
    pictures: Sequence[Picture] = (),
    examples: Sequence[Example] = (),
    notes: Sequence[str] = (),
    plots: Path | None = None,
) -> Path:
    """Write the page to `path` and return it.

    `introduction`: paragraphs between blank lines, with **bold**, `code` and "- " lists; a
    paragraph that begins with "<" is taken as HTML.
    `evaluations`: by name, what an IoU script's --json wrote; names of runs take their colour,
    others (a teacher) stand beside them. Runs that are not named bring their own.
    `pictures`: PNG files (the file's name is the caption) or (caption, image).
    `examples`: the worst and best images. `notes`: what the page can't show, and why.
    `plots`: a folder for charts and examples as PNG files.
    """
    found = {one.name: one.evaluation() for one in runs}
    evaluations = {**{name: e for name, e in found.items() if e}, **(evaluations or {})}
    colors = {name: i for i, name in enumerate(dict.fromkeys([*found, *evaluations]))}
    uncounted = [
        f"Confusion matrix of {name}: its evaluation has no counts; evaluate it by the IoU script's --json, or with "
        "--evaluate where there is no eval.json."
        for name, evaluation in evaluations.items()
        if "confusion" not in evaluation
    ]
    outdated = [
        f"eval.json of {one.name}: the training went on after it; --evaluate writes it anew."
        for one in runs
        if (written := one.eval_json()) and one.outdated(written)
    ]
    training, classes = training_charts(runs, colors), classes_chart(evaluations, colors)
    conditions, confusions = conditions_chart(evaluations, colors), confusion_charts(evaluations)
    everywhere = legend(css_colors(colors))
    sections = [
        ("Results", summary_table(runs, evaluations, colors)),
        ("Training", everywhere + charts_html(training, "charts") if training else ""),
        (
            "IoU per class",
            everywhere + wide(classes) + classes_table(evaluations) if classes else "",
        ),
        (
            "Conditions",
            everywhere + wide(conditions) + conditions_table(evaluations) if conditions else "",
        ),
        ("Confusion matrices", charts_html(confusions, "matrices") if confusions else ""),
        ("Worst and best images", examples_html(examples)),
        ("Pictures", "".join(figure(picture) for picture in pictures)),
        ("Options that differ", options_table(runs)),
        ("Made with", provenance_table(runs)),
        (
            "Not shown",
            "".join(
                f"<p class='note'>{escape(note)}</p>" for note in [*outdated, *uncounted, *notes]
            ),
        ),
    ]
    path = Path(path)
    claim_file(path, HTML)
    with atomic_write(path) as aside:
        aside.write_text(page(title, introduction, sections), encoding="utf-8")
    if plots is not None:
        claim_folder(plots)
        for chart in (*training, *filter(None, (classes, conditions)), *confusions):
            chart.save(plots)
        for old in (
            path for kind in ("worst", "best") for path in plots.glob(f"[0-9]*_{kind}.png")
        ):
            old.unlink()  # a page with more of them was here
        for index, example in enumerate(examples, 1):
            save_png(example.picture(), plots / f"{index:02}_{example.kind}.png")
    return path


def css_colors(colors: Mapping[str, int]) -> dict[str, str]:
    return {name: css_color(index) for name, index in colors.items()}


def css_color(index: int) -> str:
    """Striped from the ninth on, whose lines are dashed."""
    color = f"var(--c{index % COLORS})"
    return (
        color
        if index < COLORS
        else f"repeating-linear-gradient(90deg, {color} 0 .2rem, transparent .2rem .3rem)"
    )


def charts_html(charts: Sequence[Chart], kind: str) -> str:
    """Charts in a grid, each under its title."""
    figures = (
        f"<figure><figcaption>{escape(c.title)}</figcaption>{c.svg()}</figure>" for c in charts
    )
    return f'<div class="{kind}">{"".join(figures)}</div>'


def wide(chart: Chart) -> str:
    """One chart at the page's width."""
    return f'<div class="wide">{chart.svg()}</div>'


def summary_table(
    runs: Sequence[Run], evaluations: Mapping[str, dict[str, Any]], colors: Mapping[str, int]
) -> str:
    """A row per run or evaluation: method, mIoU, steps, parameters."""
    by_name = {one.name: one for one in runs}
    rows = []
    for name, color in colors.items():
        cells, one = [""] * 5, by_name.get(name)
        if one is not None:
            validated = [value for _, value in one.curve("val", "mean_iou")]
            steps = max((record.get("step", 0) for record in one.records), default=0)
            parameters = one.options.get("parameters")
            cells = [
                escape(str(one.options.get("method", ""))),
                percent(max(validated, default=None)),
                percent(validated[-1] if validated else None),
                f"{steps:,}",
                f"{parameters:,}" if isinstance(parameters, int) else "",
            ]
        result = evaluations.get(name, {})
        if "protocol" in result:
            evaluated = f"{percent(result['mean_iou'])} <small>{escape(result['protocol'])}</small>"
        else:
            evaluated = ""
        swatch = f'<i class="swatch" style="background:{css_color(color)}"></i>'
        rows.append([swatch + escape(name), cells[0], evaluated, *cells[1:]])
    heads = ["run", "method", "evaluated", "best", "last", "steps", "parameters"]
    used = [i for i, _ in enumerate(heads) if i == 0 or any(row[i] for row in rows)]
    note = "<p class='note'>mIoU in %: evaluated by the IoU script, best and last in training.</p>"
    return table([heads[i] for i in used], [[row[i] for i in used] for row in rows]) + note


def training_charts(runs: Sequence[Run], colors: Mapping[str, int]) -> list[Chart]:
    """mIoU, then one chart per loss term, total first."""
    validated = {
        one.name: [(step, 100 * value) for step, value in one.curve("val", "mean_iou")]
        for one in runs
    }
    teachers = {r["mean_iou"] for one in runs if (r := one.last("teacher")) and r.get("mean_iou")}
    levels = {f"teacher {100 * value:.1f}": 100 * value for value in sorted(teachers)}
    title = "mIoU in validation, %"
    charts = [
        line_chart(
            "miou", title, validated, colors, unit=" %", levels=levels, dots=True, size=LARGE
        )
    ]
    terms = dict.fromkeys(["total"])
    for one in runs:
        for record in one.records:
            terms |= dict.fromkeys(record.get("losses", {}))
    for term in terms:
        lines = {one.name: one.curve("train", "losses", term) for one in runs}
        charts.append(line_chart(f"loss_{term}", f"loss: {term}", lines, colors))
    return [chart for chart in charts if chart is not None]


def classes_chart(
    evaluations: Mapping[str, dict[str, Any]], colors: Mapping[str, int]
) -> Chart | None:
    """IoU of every class that occurs, the runs' bars against each other."""
    scores = {name: e["per_class"] for name, e in evaluations.items() if e.get("per_class")}
    names = [
        key
        for key in _classes(evaluations)
        if any(score.get(key) is not None for score in scores.values())
    ]
    bars = {name: [_percent(score.get(key)) for key in names] for name, score in scores.items()}
    return bar_chart("iou_per_class", "IoU per class, %", names, bars, colors, unit=" %")


def classes_table(evaluations: Mapping[str, dict[str, Any]]) -> str:
    """The same numbers, to unfold."""
    scores = {name: e["per_class"] for name, e in evaluations.items() if e.get("per_class")}
    rows = [
        [escape(key), *(percent(s.get(key)) for s in scores.values())]
        for key in _classes(evaluations)
    ]
    means = (f"<b>{percent(evaluations[name].get('mean_iou'))}</b>" for name in scores)
    numbers = table(["class", *map(escape, scores)], [*rows, ["<b>mean</b>", *means]])
    return f"<details><summary>Numbers, IoU in %</summary>{numbers}</details>"


def _classes(evaluations: Mapping[str, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for e in evaluations.values() for key in e.get("per_class", ())))


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def conditions_chart(
    evaluations: Mapping[str, dict[str, Any]], colors: Mapping[str, int]
) -> Chart | None:
    """mIoU under each condition, where an evaluation has them."""
    split = {name: e["conditions"] for name, e in evaluations.items() if e.get("conditions")}
    names = list(dict.fromkeys(key for conditions in split.values() for key in conditions))
    bars = {
        name: [_percent(conditions.get(key, {}).get("mean_iou")) for key in names]
        for name, conditions in split.items()
    }
    return bar_chart("conditions", "mIoU by condition, %", names, bars, colors, unit=" %")


def confusion_charts(evaluations: Mapping[str, dict[str, Any]]) -> list[Chart]:
    """One matrix for each evaluation that has counts."""
    return [
        confusion_chart(
            f"confusion_{_stem(name)}",
            f"{name}, % of each true class",
            e["confusion"],
            list(e["per_class"]),
        )
        for name, e in evaluations.items()
        if "confusion" in e and "per_class" in e
    ]


def _stem(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name)


def examples_html(examples: Sequence[Example]) -> str:
    """Each example's panels, and the classes' colours."""
    if not examples:
        return ""
    groups = []
    for kind in dict.fromkeys(example.kind for example in examples):
        chosen = "".join(panels(e.name, e.panels) for e in examples if e.kind == kind)
        groups.append(f"<h3>{kind.capitalize()}</h3>{chosen}")
    classes, present = (
        examples[0].classes,
        sorted(set.union(*(example.present for example in examples))),
    )
    names = [*classes.names, "ignore"]
    colors = {names[index]: "rgb({},{},{})".format(*classes.palette[index]) for index in present}
    note = "By the mean IoU in % over the classes that occur in the image, averaged over the runs."
    return f"<p class='note'>{note}</p>{legend(colors)}{''.join(groups)}"


def conditions_table(evaluations: Mapping[str, dict[str, Any]]) -> str:
    """mIoU under each condition, where an evaluation has them."""
    split = {name: e for name, e in evaluations.items() if e.get("conditions")}
    names = list(dict.fromkeys(key for e in split.values() for key in e["conditions"]))
    rows = [
        [escape(name), *(percent(e["conditions"].get(key, {}).get("mean_iou")) for key in names)]
        for name, e in split.items()
    ]
    return table(["mIoU, %", *map(escape, names)], rows) if rows else ""


def options_table(runs: Sequence[Run]) -> str:
    """The options in which the runs differ, other than their own folders."""
    keys = dict.fromkeys(key for one in runs for key in one.options if key != "output_dir")
    rows = []
    for key in keys:
        values = [one.options.get(key) for one in runs]
        if any(value != values[0] for value in values):
            rows.append([escape(key), *(escape("" if v is None else str(v)) for v in values)])
    return table(["option", *(escape(one.name) for one in runs)], rows) if rows else ""


def provenance_table(runs: Sequence[Run]) -> str:
    """What each run was last started with: versions, device, revision of the code, data."""
    rows = []
    for one in runs:
        begin = one.last("start")
        if begin is None:
            continue
        versions = ", ".join(
            f"{name} {version}" for name, version in begin.get("versions", {}).items()
        )
        device = f"{begin.get('device')}, {begin.get('threads')} threads"
        cells = (
            one.name,
            versions,
            device,
            begin.get("revision") or "",
            one.options.get("data", ""),
        )
        rows.append([escape(str(cell)) for cell in cells])
    return table(["run", "versions", "device", "revision", "data"], rows) if rows else ""


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, each with its metrics.jsonl."""
    output: Path = Path("report.html")
    """The page to write."""
    plots: Path | None = None
    """Folder of the PNG files (default: the page's name and _plots, beside it)."""
    title: str = "Training report"
    """The page's heading."""
    evaluate: bool = False
    """First evaluate the runs that have no eval.json, or have been trained on since, on the validation split of their
    data set, and write it."""
    examples: int = 3
    """How many of the worst and of the best images to show."""
    datadir: Path | None = None
    """Where the data set is now (default: where it was in training or evaluation)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""


def main(options: Options) -> None:
    """Write one page about these runs."""
    if not options.runs:
        raise UserError("no run given; name at least one run folder")
    if options.examples < 0:
        raise UserError("--examples must be at least 0")
    claim_file(options.output, HTML)
    plots = options.plots or options.output.with_name(f"{options.output.stem}_plots")
    claim_folder(plots)
    names = [folder.resolve().name for folder in options.runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in options.runs]
    runs = [Run(name, folder) for name, folder in zip(names, options.runs, strict=True)]
    for one in runs:
        one.last("start")  # what is no run is refused now, not after the others were evaluated
    if options.evaluate:
        for one in runs:
            evaluate_run(one, options)
    evaluations = {one.name: e for one in runs if (e := one.evaluation())}
    examples, notes = find_examples(
        evaluations,
        count=options.examples,
        datadir=options.datadir,
        device=find_device(options.device),
    )
    path = write_report(
        options.output, title=options.title, runs=runs, examples=examples, notes=notes, plots=plots
    )
    print(f"report: {path}, plots: {plots}")


def evaluate_run(one: Run, options: Options) -> None:
    """Write the run's eval.json if it has none, or an outdated one.

    Raises:
        UserError: its weights or data are gone.
    """
    found = one.eval_json()
    if found is not None and not one.outdated(found):
        return
    missing = [key for key, kind in NEEDED.items() if not isinstance(one.options.get(key), kind)]
    if missing:
        raise UserError(
            f"{one.folder / 'options.json'} has no {missing[0]}; evaluate this run by its IoU script"
        )
    again = found or {}  # as it was evaluated before
    kept = {key: again[key] for key in ("subset", "protocol") if key in again}
    chosen = IoUOptions(
        datadir=options.datadir or Path(one.options["datadir"]),
        weights=Path(
            again.get(
                "weights", one.folder / f"{one.options.get('network', 'student')}.safetensors"
            )
        ),
        **kept,
        height=again.get("height", one.options["height"]),
        num_workers=0,
        device=options.device,
        json=one.folder / "eval.json",
    )
    score(one.options["dataset"], chosen)


if __name__ == "__main__":
    run(main, Options)
