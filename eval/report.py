"""One HTML page about training runs, which needs no other file.

    python -m eval.report outputs/student_cityscapes outputs/TransKDBase_cityscapes --evaluate

It reads options.json and metrics.jsonl of each run's folder, and eval.json where there is one:
`--evaluate` makes it, and so does `eval/eval_…_iou.py --json RUN/eval.json`.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import cli  # isort: skip  # before torch

import jinja2
import matplotlib as mpl
import numpy as np
import tyro
from matplotlib.figure import Figure

from datasets import open_split
from errors import UserError
from eval.commands import IoUOptions, claim_file, score
from eval.metrics import percent
from eval.predictor import Predictor
from eval.rendering import colorize
from files import OUTPUTS, atomic_write, read_json, read_records
from models import read_checkpoint

TEMPLATE = Path(__file__).with_name("report.html.jinja")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b3589a", "#a67c00", "#4b9cd3", "#7a6ff0", "#6b7280")
# Charts are drawn for a light page; a dark page inverts them.
STYLE: dict[Any, Any] = {
    "axes.edgecolor": "gray",
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.alpha": 0.4,
    "text.parse_math": False,  # a run's name may have dollars
}


@dataclass
class Options:
    """Write one page about training runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, each with its metrics.jsonl."""
    output: Path = OUTPUTS / "report.html"
    """The page to write."""
    plots: Path | None = None
    """Also write the curves as PNG files into this folder."""
    evaluate: bool = False
    """First evaluate the runs that have no eval.json, or were trained on since."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""


@dataclass
class LoggedRun:
    """What lies in a run's folder, and what the page calls it."""

    name: str
    options: dict[str, Any]
    records: list[dict[str, Any]]

    def last(self, event: str) -> dict[str, Any]:
        """The last record of an event; empty where there is none."""
        return next((r for r in reversed(self.records) if r["event"] == event), {})

    def curve(self, event: str, key: str, scale: float = 1) -> list[tuple[float, float]]:
        """(step, value) of a loss or a score; of a step that a resumed run repeats, the last."""
        records = [record for record in self.records if record["event"] == event]
        by_step = {record["step"]: record.get("losses", record).get(key) for record in records}
        return sorted((step, scale * value) for step, value in by_step.items() if value is not None)


def main(options: Options) -> None:
    if not options.runs:
        raise UserError("no run given; name at least one run folder")
    folders = [folder.expanduser() for folder in options.runs]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    for folder in folders:
        read_records(folder / "metrics.jsonl")  # what is no run is refused before the long work
    for folder in folders:
        trained = read_json(folder / "options.json") or {}
        weights = folder / f"{trained.get('network', 'student')}.safetensors"
        if options.evaluate and weights.is_file() and read_evaluation(folder) is None:
            flags = IoUOptions(Path(trained["datadir"]), weights=weights, device=options.device)
            flags.json = folder / "eval.json"
            score(trained["dataset"], flags)
    runs = dict(zip(names, folders, strict=True))
    path = write_report(options.output, runs=runs, device=options.device, plots=options.plots)
    print(f"report: {path}")


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """A run's eval.json; None if there is none, or the training went on after it.

    Its weights are those beside it: the folder may have been moved.
    """
    evaluation = read_json(folder / "eval.json")
    if evaluation is not None:
        weights = folder / Path(evaluation.get("weights", "")).name
        if weights.suffix == ".safetensors" and weights.is_file():
            evaluation["weights"] = str(weights)
            if evaluation.get("step") != read_checkpoint(weights).facts.get("step"):
                return None
    return evaluation


def write_report(
    path: Path,
    *,
    title: str = "Training report",
    introduction: str = "",
    runs: Mapping[str, Path],
    evaluations: Mapping[str, dict[str, Any]] | None = None,
    spaced: int = 0,
    device: str = "cpu",
    plots: Path | None = None,
) -> Path:
    """Write the page to `path` and return it.

    The introduction is plain text, with empty lines between paragraphs; runs are folders, by their
    names on the page; evaluations are what an IoU script's --json wrote, of a run (instead of its
    eval.json) or not; so many evenly `spaced` images are shown, beside the worst and the best;
    `plots` is a folder for the curves as PNG files.
    """
    path = claim_file(path, ".html")
    evaluated = dict(evaluations or {})
    loaded = []
    notes = []
    for name, folder in runs.items():
        options = read_json(folder / "options.json") or {}
        loaded.append(LoggedRun(name, options, read_records(folder / "metrics.jsonl")))
        evaluation = evaluated.get(name) or read_evaluation(folder)
        if evaluation is None:
            notes.append(f"Evaluation of {name}: none of its last weights; --evaluate makes it.")
        else:
            evaluated[name] = evaluation
    images = []
    try:
        images = choose_images(evaluated, spaced, device)
    except UserError as error:  # data or weights are gone
        notes.append(f"Images: {error}.")
    names = dict.fromkeys([*runs, *evaluated])
    colors = dict(zip(names, cycle(COLORS), strict=False))
    curves = draw_curves(loaded, colors)
    template = jinja2.Template(TEMPLATE.read_text("utf-8"), autoescape=True, trim_blocks=True)
    shown = {"runs": loaded, "evaluated": evaluated, "colors": colors, "curves": curves}
    shown |= {"title": title, "introduction": introduction, "images": images, "notes": notes}
    page = template.render(shown, percent=percent, address=address)
    with atomic_write(path) as temporary:
        temporary.write_bytes(page.encode(errors="replace"))  # of file names that are no UTF-8
    if plots is not None:
        for name, figure in curves.items():
            figure.legend(title=name, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
            with atomic_write(plots / f"{name.replace(' ', '_')}.png") as temporary:
                figure.savefig(temporary, dpi=200, facecolor="white", bbox_inches="tight")
    return path


def address(save: Callable[..., object], kind: str) -> str:
    """An image as an address that holds it: of a picture's `save` or a figure's `savefig`."""
    buffer = io.BytesIO()
    save(buffer, format=kind.removesuffix("+xml"))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@mpl.rc_context(STYLE)
def draw_curves(runs: Sequence[LoggedRun], colors: Mapping[str, str]) -> dict[str, Figure]:
    """By title: validation mIoU, large, then the losses, the total first."""
    terms = {name for run in runs for record in run.records for name in record.get("losses", {})}
    wanted = [("validation mIoU", "val", "mean_iou", 100)]
    for term in sorted(terms, key=lambda term: (term != "total", term)):
        wanted.append((f"{term} loss", "train", term, 1))
    wanted += [("validation loss", "val", "loss", 1), ("training mIoU", "val", "train_iou", 100)]
    figures = {}
    for title, event, key, scale in wanted:
        by_run = {run.name: run.curve(event, key, scale) for run in runs}
        curves = {name: curve for name, curve in by_run.items() if curve}
        if not curves:
            continue
        figure = figures[title] = Figure((7.4, 5.4) if key == "mean_iou" else (3.6, 2.3))
        axes = figure.add_subplot(xlabel="step")
        for name, curve in curves.items():
            # At most 120 means of neighbours: noise must not hide the course of a long run.
            groups = np.array_split(np.array(curve), min(len(curve), 120))
            steps, values = np.array([group.mean(axis=0) for group in groups]).T
            marker = "o" if len(curve) <= 40 else None
            axes.plot(steps, values, color=colors[name], marker=marker, markersize=3, label=name)
        axes.set(xlim=(0, None), ylim=(0, None))
    return figures


def choose_images(
    evaluated: Mapping[str, dict[str, Any]], spaced: int, device: str
) -> list[dict[str, Any]]:
    """Images with their truth and every run's prediction, each with what it is chosen for.

    So many evenly `spaced` ones, and the three of the lowest and of the highest mean IoU, averaged
    over the runs. Raises UserError if data or weights are gone.
    """
    scored = {name: one for name, one in evaluated.items() if "per_image" in one}
    if not scored:
        return []
    first = next(iter(scored.values()))
    place = ("dataset", "datadir", "subset")
    if any(one[key] != first[key] for one in scored.values() for key in place):
        raise UserError("the runs were evaluated on different data")
    data = open_split(*(first[key] for key in place))
    means = {}
    for index, sample in enumerate(data.samples):
        scores = [one["per_image"].get(sample.name) for one in scored.values()]
        if None not in scores:
            means[index] = fmean(scores)
    ranked = sorted(means, key=lambda index: (means[index], index))
    best = ranked[3:][::-1][:3]  # the best one first, and none that is among the worst
    even = np.linspace(0, len(data) - 1, spaced).astype(int).tolist()
    kinds = {"Evenly spaced": even, "Worst": ranked[:3], "Best": best}
    images: list[dict[str, Any]] = []
    for kind, chosen in kinds.items():
        for index in chosen:
            truth = colorize(data.full_label(index), data.classes)
            panels = {"photograph": data.photograph(index), "truth": truth}
            name = data.samples[index].name
            images.append({"name": name, "kind": kind, "classes": data.classes, "panels": panels})
    for run, one in scored.items():
        flags = {"dataset": one["dataset"], "height": one["height"], "device": device}
        predict = Predictor(one["weights"], **flags)
        for image in images:
            _, colors = predict(image["panels"]["photograph"])
            image["panels"][f"{run}, {percent(one['per_image'][image['name']])}"] = colors
    return images


if __name__ == "__main__":
    cli.run(main, Options)
