"""One HTML page about training runs: table, curves, IoU per class, pictures. No other file needed.

    python -m eval.report outputs/student outputs/TransKDBase --output report.html

Reads options.json and metrics.jsonl of each run folder, and eval.json where there is one (put it
there by `eval/eval_…_iou.py --json RUN/eval.json`); without it the last validation is shown.
"""

import json
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

from cli import UserError, run
from eval.charts import LARGE, bar_chart, legend, line_chart
from eval.metrics import percent
from eval.page import Picture, figure, page, table


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
        """The lines of metrics.jsonl; a last line cut short by a killed run is left out."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            raise UserError(f"{path} is missing; name the folder of a training run")
        records = []
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

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
        """eval.json, or else the last validation."""
        return read_json(self.folder / "eval.json") or self.last("val")


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's content, None if there is no file. Raises UserError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); write it again or remove it") from error


def write_report(
    path: Path | str,
    *,
    title: str,
    introduction: str = "",
    runs: Sequence[Run] = (),
    evaluations: Mapping[str, dict[str, Any]] | None = None,
    pictures: Sequence[Picture] = (),
) -> Path:
    """Write the page to `path` and return it.

    `introduction`: paragraphs between blank lines, with **bold**, `code` and "- " lists; a
    paragraph that begins with "<" is taken as HTML.
    `evaluations`: by name, what an IoU script's --json wrote; names of runs take their colour,
    others (a teacher) stand beside them. Runs that are not named bring their own.
    `pictures`: PNG files (the file's name is the caption) or (caption, image).
    """
    found = {one.name: one.evaluation() for one in runs}
    evaluations = {**{name: e for name, e in found.items() if e}, **(evaluations or {})}
    colors = {name: i for i, name in enumerate(dict.fromkeys([*found, *evaluations]))}
    sections = [
        ("Results", summary_table(runs, evaluations, colors)),
        ("Training", curves(runs, colors)),
        ("IoU per class", classes_section(evaluations, colors)),
        ("Conditions", conditions_table(evaluations)),
        ("Pictures", "".join(figure(picture) for picture in pictures)),
        ("Options that differ", options_table(runs)),
        ("Made with", provenance_table(runs)),
    ]
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(title, introduction, sections), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def summary_table(runs: Sequence[Run], evaluations: Mapping[str, dict[str, Any]], colors: Mapping[str, int]) -> str:
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
            score = f"{percent(result['mean_iou'])} <small>{escape(result['protocol'])}</small>"
        else:
            score = ""
        swatch = f'<i class="swatch" style="background:var(--c{color % 8})"></i>'
        rows.append([swatch + escape(name), cells[0], score, *cells[1:]])
    heads = ["run", "method", "evaluated", "best", "last", "steps", "parameters"]
    used = [i for i, _ in enumerate(heads) if i == 0 or any(row[i] for row in rows)]
    note = "<p class='note'>mIoU in %: evaluated by the IoU script, best and last in training.</p>"
    return table([heads[i] for i in used], [[row[i] for i in used] for row in rows]) + note


def curves(runs: Sequence[Run], colors: Mapping[str, int]) -> str:
    """mIoU, then one chart per loss term, total first."""
    if not runs:
        return ""
    mine = {one.name: colors[one.name] for one in runs}
    validated = {one.name: [(step, 100 * value) for step, value in one.curve("val", "mean_iou")] for one in runs}
    teachers = {r["mean_iou"] for one in runs if (r := one.last("teacher")) and r["mean_iou"]}
    levels = {f"teacher {100 * value:.1f}": 100 * value for value in sorted(teachers)}
    charts = [
        (
            "mIoU in validation, %",
            line_chart(validated, colors, label="mIoU by step", unit=" %", levels=levels, dots=True, size=LARGE),
        )
    ]
    terms = dict.fromkeys(["total"])
    for one in runs:
        for record in one.records:
            terms |= dict.fromkeys(record.get("losses", {}))
    for term in terms:
        lines = {one.name: one.curve("train", "losses", term) for one in runs}
        lines = {name: points for name, points in lines.items() if points}
        charts.append((f"loss: {term}", line_chart(lines, colors, label=f"{term} loss by step")))
    figures = (f"<figure><figcaption>{escape(name)}</figcaption>{chart}</figure>" for name, chart in charts if chart)
    return legend(mine) + f'<div class="charts">{"".join(figures)}</div>'


def classes_section(evaluations: Mapping[str, dict[str, Any]], colors: Mapping[str, int]) -> str:
    """Bars, and the same numbers as a table to unfold."""
    scores = {name: e["per_class"] for name, e in evaluations.items() if e.get("per_class")}
    if not scores:
        return ""
    names = list(dict.fromkeys(name for score in scores.values() for name in score))
    bars = {
        name: [None if score.get(key) is None else 100 * score[key] for key in names] for name, score in scores.items()
    }
    rows = [[escape(key), *(percent(s.get(key)) for s in scores.values())] for key in names]
    means = (f"<b>{percent(evaluations[name].get('mean_iou'))}</b>" for name in scores)
    numbers = table(["class", *map(escape, scores)], [*rows, ["<b>mean</b>", *means]])
    return (
        legend({name: colors[name] for name in scores})
        + f'<div class="wide">{bar_chart(names, bars, colors, label="IoU per class", unit=" %")}'
        + f"</div><details><summary>Numbers, IoU in %</summary>{numbers}</details>"
    )


def conditions_table(evaluations: Mapping[str, dict[str, Any]]) -> str:
    """mIoU of all conditions together and of each, where an evaluation has them."""
    split = {name: e for name, e in evaluations.items() if e.get("conditions")}
    names = list(dict.fromkeys(key for e in split.values() for key in e["conditions"]))
    rows = [
        [
            escape(name),
            percent(e["mean_iou"]),
            *(percent(e["conditions"].get(key, {}).get("mean_iou")) for key in names),
        ]
        for name, e in split.items()
    ]
    return table(["mIoU, %", "all", *map(escape, names)], rows) if rows else ""


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
        versions = ", ".join(f"{name} {version}" for name, version in begin["versions"].items())
        device = f"{begin['device']}, {begin['threads']} threads"
        cells = (one.name, versions, device, begin["revision"] or "", one.options.get("data", ""))
        rows.append([escape(str(cell)) for cell in cells])
    return table(["run", "versions", "device", "revision", "data"], rows) if rows else ""


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, each with its metrics.jsonl."""
    output: Path = Path("report.html")
    """The page to write."""
    title: str = "Training report"
    """The page's heading."""


def main(options: Options) -> None:
    """Write one page about these runs."""
    if not options.runs:
        raise UserError("no run given; name at least one run folder")
    names = [folder.resolve().name for folder in options.runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in options.runs]
    runs = [Run(name, folder) for name, folder in zip(names, options.runs, strict=True)]
    print(f"report: {write_report(options.output, title=options.title, runs=runs)}")


if __name__ == "__main__":
    run(main, Options)
