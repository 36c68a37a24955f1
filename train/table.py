"""A table of methods × seeds: trains and evaluates every run that is not finished, and writes the table.

    python -m train.table --grid drawn                              # a small one on drawn scenes, in minutes
    python -m train.table --grid cityscapes --datadir DIR --gpus 0,1

A grid is a TOML file; train/grids/ has the paper's tables:

    seeds = [0, 1, 2]
    weights = "best"                # which weights are evaluated, and teach: "last" or "best"
    [options]                       # flags of every row, under the scripts' own names
    height = 512
    [presets.eighth]                # flags of the rows that say presets = ["eighth"]
    subset-every = 8
    [evaluation]
    script = "eval/eval_cityscapes_iou.py"     # or eval/eval_iou.py with a dataset among the options
    options = { subset = "val" }
    [[rows]]
    name = "teacher"
    script = "train/teacher.py"     # or weights = "FILE": evaluated, taught from, not trained
    seeds = [0]                     # one teacher for the students of all seeds
    [[rows]]
    name = "student"
    script = "train/student.py"
    published = 55.86
    [[rows]]
    name = "TransKDBase"
    script = "train/TransKDBase.py"
    teacher = "teacher"             # the row above that teaches
    baseline = "student"            # the row that the gain is measured against, seed by seed
    options = { embed = 5 }         # this row's own flags

Further keys: title, datadir, and [scenes], the options of datasets.synthetic for data that is drawn first. Paths are
relative to the folder in which the command is given.

A run's folder, OUTPUT/ROW-seedN, holds its checkpoints, log.txt and eval.json; table.md and table.json stand beside
the folders and are written after every run. Interrupted or killed, the same command goes on where it stopped: SIGINT
and SIGTERM reach the trainings, which save; those that outlive a killed table are waited for. A row whose flags or
training data have changed is refused, one whose evaluation or its data have changed is evaluated again. A run that
fails does not stop the others; the table then says why and where its log is, and the exit code is 1.
"""

import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor, nn

import cli
from datasets import find_layout, synthetic
from errors import UserError
from eval.commands import PROTOCOLS
from files import atomic_write
from models import create_model
from models.distillation import Distiller
from models.distillation.methods import METHODS, PUBLISHED, Settings
from models.info import count_macs, published_macs
from train.grid import (
    Grid,
    Job,
    given_model,
    last_record,
    plan,
    read_grid,
    scene_options,
    seeds_on_disk,
    short,
    with_teacher,
)
from train.options import ROOT, DistillationOptions, StudentOptions
from train.run_folder import claim
from train.runner import Runner, slots

WIDTH = 120  # of the printed table, where there is no terminal to ask
IMAGE = 512, 1024  # for which the paper counts multiply-accumulates
HEADS = ("", "mIoU, %", "seeds", "gain", "published", "params, M", "GMACs", "steps")
NOTES = (
    "± is the sample standard deviation over seeds. Gain: over the row's baseline, seed by seed.",
    "Parameters and multiply-accumulates (an image of {}×{}, counted as in the paper) of the network that is deployed, "
    "in brackets with the modules that only training needs.",
)


@dataclass(kw_only=True)
class Options:
    """Train, evaluate and tabulate the rows of a grid."""

    grid: Path
    """A TOML file, or the name of one in train/grids/: drawn, camvid, cityscapes, …"""
    datadir: Path | None = None
    """The data set's folder, instead of the grid's."""
    teacher_weights: Path | None = None
    """A trained teacher, in the place of the rows that teach and are such a network."""
    output_dir: Path | None = None
    """Where runs and table go. Default: outputs/GRID in the repository."""
    only: tuple[str, ...] = ()
    """Run these rows, and the teachers they need."""
    seeds: tuple[int, ...] = ()
    """Run these seeds instead of the grid's (rows with seeds of their own keep them)."""
    gpus: str = ""
    """GPUs to spread the runs over, one at a time on each: 0,1"""
    jobs: int = 1
    """Runs at a time without --gpus. Each gets its share of the cores, unless OMP_NUM_THREADS is set."""
    dry_run: bool = False
    """Print the commands, run nothing."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None for a single value) of n seeds' values."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        if not values:
            return None
        return cls(
            statistics.mean(values),
            statistics.stdev(values) if len(values) > 1 else None,
            len(values),
        )

    def text(self, sign: str = "") -> str:
        return f"{self.mean:{sign}.2f}" + ("" if self.sd is None else f" ± {self.sd:.2f}")


@dataclass(frozen=True)
class Size:
    """Parameters and multiply-accumulates, deployed and with what only training needs."""

    parameters: int
    macs: int
    training_parameters: int
    training_macs: int

    def texts(self) -> list[str]:
        pairs = (
            (self.parameters / 1e6, self.training_parameters / 1e6),
            (self.macs / 1e9, self.training_macs / 1e9),
        )
        return [f"{one:.2f}" + ("" if two == one else f" ({two:.2f})") for one, two in pairs]


@cache
def size_of(job: Job) -> Size:
    """A run's size, counted on the meta device. A method of unknown making counts as its student."""
    options = job.options
    if options is None:
        return _size(given_model(f"row {job.row.name}", job.weights))
    outputs = find_layout(options.dataset).classes.num_outputs
    with torch.device("meta"):
        if not isinstance(options, StudentOptions):
            return _size(create_model(options.teacher_model, outputs))  # type: ignore[attr-defined]
        student = create_model(options.student_model, outputs)
        method = METHODS.get(PUBLISHED.get(options.method, options.method))
        if method is None or not isinstance(options, DistillationOptions):
            return _size(student)
        teacher = create_model(options.teacher_model, outputs)
        return _size(
            student, method(student, teacher, None, Settings(options.stages, options.losses()))
        )


class Step(nn.Module):
    """A training step's forward pass, the teacher's included, whose layers are no submodules: no hook sees them."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        labels = images.new_zeros((1, *(side // 4 for side in IMAGE)), dtype=torch.long)
        return self.distiller(images, labels)


def _size(network: nn.Module, distiller: Distiller | None = None) -> Size:
    def parameters(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    def macs(module: nn.Module) -> int:
        return published_macs(count_macs(module.eval(), torch.empty(1, 3, *IMAGE, device="meta")))

    training = Step(distiller) if distiller else network
    return Size(parameters(network), macs(network), parameters(training), macs(training))


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row of the table; mIoU in %, by seed, and by condition and seed."""

    job: Job
    miou: Mapping[int, float]
    conditions: Mapping[str, Mapping[int, float]]
    gain: Spread | None
    steps: Sequence[int]
    planned: int
    failed: Mapping[int, str]

    @property
    def spread(self) -> Spread | None:
        return Spread.of([*self.miou.values()])

    def cells(self) -> list[str]:
        row, spread = self.job.row, self.spread
        seeds = str(len(self.miou)) + (
            f" of {self.planned}" if len(self.miou) < self.planned else ""
        )
        return [
            row.label,
            spread.text() if spread else "–",
            seeds + (f", {len(self.failed)} failed" if self.failed else ""),
            self.gain.text("+") if self.gain else "–",
            "–" if row.published is None else f"{row.published:.2f}",
            *size_of(self.job).texts(),
            " to ".join(f"{step:,}" for step in sorted({min(self.steps), max(self.steps)}))
            if self.steps
            else "–",
        ]

    def condition_cells(self, names: Sequence[str]) -> list[str]:
        spreads = (Spread.of([*self.conditions.get(name, {}).values()]) for name in names)
        return [self.job.row.label, *(spread.text() if spread else "–" for spread in spreads)]

    def as_json(self) -> dict[str, Any]:
        row = self.job.row
        return {
            "row": row.name,
            "label": row.label,
            "miou": self.spread and asdict(self.spread),
            "miou_by_seed": self.miou,
            "baseline": row.baseline or None,
            "gain": self.gain and asdict(self.gain),
            "published": row.published,
            "conditions": {
                name: asdict(s)
                for name, v in self.conditions.items()
                if (s := Spread.of([*v.values()]))
            },
            **asdict(size_of(self.job)),
            "steps": self.steps,
            "failed": self.failed,
        }


def results(jobs: Sequence[Job], failed: Mapping[Job, str]) -> list[Result]:
    """What the runs' folders hold, row by row."""
    scores = {job: score for job in jobs if (score := job.score()) is not None}
    rows: dict[str, list[Job]] = {}
    for job in jobs:
        rows.setdefault(job.row.name, []).append(job)
    miou = {
        name: {job.seed: 100 * scores[job]["mean_iou"] for job in row if job in scores}
        for name, row in rows.items()
    }
    table = []
    for name, row in rows.items():
        alone = miou.get(row[0].row.baseline, {})
        conditions: dict[str, dict[int, float]] = {}
        for job in row:
            for condition, part in scores.get(job, {}).get("conditions", {}).items():
                if part.get("mean_iou") is not None:
                    conditions.setdefault(condition, {})[job.seed] = 100 * part["mean_iou"]
        table.append(
            Result(
                job=row[0],
                miou=miou[name],
                conditions=conditions,
                gain=Spread.of(
                    [value - alone[seed] for seed, value in miou[name].items() if seed in alone]
                ),
                steps=[
                    r["step"]
                    for job in row
                    if job in scores and job.options and (r := last_record(job.folder))
                ],
                planned=len(row),
                failed={job.seed: failed[job] for job in row if job in failed},
            )
        )
    return table


@dataclass
class Table:
    """The table of a grid, from its runs' folders to `folder`."""

    grid: Grid
    jobs: Sequence[Job]
    folder: Path

    def parts(self, rows: Sequence[Result]) -> list[tuple[list[str], list[list[str]]]]:
        """The table, and one by condition where the data set has them: heads and rows of cells."""
        shown = [
            i
            for i, head in enumerate(HEADS)
            if head != "published" or any(r.job.row.published for r in rows)
        ]
        cells = [row.cells() for row in rows]
        parts = [([HEADS[i] for i in shown], [[row[i] for i in shown] for row in cells])]
        if names := list(dict.fromkeys(name for row in rows for name in row.conditions)):
            parts.append((["mIoU, %", *names], [row.condition_cells(names) for row in rows]))
        return parts

    def write(self, failed: Mapping[Job, str]) -> list[Result]:
        """Write table.md and table.json."""
        rows, measure = results(self.jobs, failed), self.jobs[0].measure
        text = [f"# {self.grid.title}", ""]
        for heads, cells in self.parts(rows):
            lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *cells]
            text += [*("| " + " | ".join(line) + " |" for line in lines), ""]
        text += [
            f"Mean IoU of the {self.grid.weights} weights over the classes that occur in {measure['subset']}, "
            f"{PROTOCOLS[measure['protocol']]}.",
            *(note.format(*IMAGE) for note in NOTES),
            *(
                f"\n{row.job.row.name} seed {seed} failed: {why}"
                for row in rows
                for seed, why in row.failed.items()
            ),
        ]
        content = {
            "title": self.grid.title,
            "evaluation": measure,
            "rows": [row.as_json() for row in rows],
        }
        for name, written in (
            ("table.md", "\n".join(text)),
            ("table.json", json.dumps(content, indent=2)),
        ):
            with atomic_write(self.folder / name) as aside:
                aside.write_text(written + "\n", encoding="utf-8")
        return rows

    def show(self, failed: Mapping[Job, str]) -> None:
        """Write it, and print it."""
        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH)
        for heads, cells in self.parts(self.write(failed)):
            table = RichTable(title=self.grid.title)
            for i, head in enumerate(heads):
                table.add_column(head, justify="right" if i else "left", no_wrap=i > 0)
            for row in cells:
                table.add_row(*row)
            console.print(table)
        print(f"written to {short(self.folder)}/table.md and table.json")


def chosen(jobs: Sequence[Job], only: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """The runs of these rows (all, if none is named) and seeds, and their teachers.

    Raises:
        UserError: a row does not exist.
    """
    rows = dict.fromkeys(job.row.name for job in jobs)
    if unknown := [name for name in only if name not in rows]:
        raise UserError(f"--only: no row is called {unknown[0]!r}; choose from {', '.join(rows)}")
    found = [
        j
        for j in jobs
        if (not only or j.row.name in only) and (j.row.seeds is not None or j.seed in seeds)
    ]
    for job in found:  # grows on the way: teachers have teachers
        if job.teacher is not None and job.teacher not in found:
            found.append(job.teacher)
    return [job for job in jobs if job in found]


def main(options: Options) -> None:
    grid, places = read_grid(options.grid), slots(options.gpus, options.jobs)
    if options.teacher_weights is not None:
        grid = with_teacher(grid, options.teacher_weights)
    output = options.output_dir or ROOT / "outputs" / options.grid.stem
    datadir, scenes = options.datadir or grid.datadir, None
    if datadir is None:
        datadir = output / "data"
        scenes = scene_options(grid, datadir)
        if scenes is None:
            raise UserError("no data to train on; name the data set's folder by --datadir")
    elif not datadir.is_dir():
        raise UserError(f"no folder {datadir}; name the data set's folder by --datadir")
    seeds = options.seeds or grid.seeds
    jobs = plan(
        replace(grid, seeds=tuple(sorted({*seeds, *seeds_on_disk(grid, output)}))), datadir, output
    )
    selected = chosen(jobs, options.only, seeds)
    if options.dry_run:
        if scenes is not None:
            print(f"# draws {scenes.train + scenes.val} scenes into {short(datadir)}")
        for job in selected:
            standing = job.standing()
            print(f"# {job}: {standing}")
            for command in job.commands(standing):
                print(f"python {shlex.join(command)}")
        return
    table = Table(grid, jobs, output)
    with claim(output, "table"):
        if scenes is not None:
            synthetic.main(scenes)
        runner = Runner(selected, places, lambda failed: table.write(failed))
        runner.run()
        table.show(runner.failed)
    if runner.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, Options)
