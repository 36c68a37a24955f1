"""A table of methods × seeds: trains and evaluates every run that is not done, writes the table.

    python -m train.table --grid drawn                             # in miniature, on drawn scenes
    python -m train.table --grid cityscapes --datadir DIR --gpus 0,1

train/grid.py says how a grid is written. A run's folder, OUTPUT/ROW-seedN, holds its checkpoints,
log.txt and eval.json; table.md and table.json are written after every run. Runs that are done by
the same commands are skipped, others are resumed: interrupted, give the same command again. A run
that fails stops no other; the table says where its log is, and the exit code is 1. With --slurm
every run becomes a job of the cluster.
"""

import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import cli
from errors import UserError
from eval.commands import PROTOCOLS
from files import OUTPUTS, ROOT, atomic_write, read_records, write_json
from train.cost import Cost, cost_of
from train.grid import Grid, Row, flags, read_grid
from train.jobs import Job, run_here, submit
from train.options import TrainingOptions

HEADS = ("", "mIoU, %", "seeds", "gain", "published", "params, M", "GMACs", "GMACs a step",
         "steps", "PFLOP", "s a step")  # fmt: skip
NOTES = """\
± is the sample standard deviation over seeds. Gain: over the row's baseline, seed by seed.
Parameters and multiply-accumulates (an image of 512×1024, counted as in the paper) are those of
the network that is deployed. A training step is counted as it runs: the teacher's forward pass, and
three times that of what learns, for images twice as wide as high; PFLOP is 2·10⁻¹⁵ of that,
over all steps. Seconds are measured."""


@dataclass(kw_only=True)
class Options:
    """Train, evaluate and tabulate the rows of a grid."""

    grid: Path
    """A TOML file, or the name of one in train/grids/: drawn, camvid, cityscapes, …"""
    datadir: Path | None = None
    """The data set's folder."""
    teacher_weights: Path | None = None
    """A trained teacher, in the place of the rows that teach."""
    output_dir: Path | None = None
    """Where runs and table go. Default: outputs/GRID in the repository."""
    only: tuple[str, ...] = ()
    """Run these rows, and the teachers they need."""
    seeds: tuple[int, ...] = ()
    """Run these seeds instead of the grid's (rows with seeds of their own keep them)."""
    gpus: str = ""
    """GPUs to spread the runs over, one at a time on each: 0,1"""
    slurm: str | None = None
    """Submit every run to Slurm with these options of sbatch: 'partition=gpu,time=12:00:00'."""
    dry_run: bool = False
    """Print the commands, run nothing."""


@dataclass(kw_only=True, eq=False)
class TableRun(Job):
    """A row's run with one seed, its training's options, and what it costs."""

    row: Row
    seed: int
    options: TrainingOptions | None = None
    cost: Cost | None = None

    def measured(self) -> tuple[int, float | None]:
        """Steps of its training so far, and the median seconds of one."""
        path = self.folder / "metrics.jsonl"
        records = read_records(path) if path.is_file() else []
        # The first record is that of the first step, which is slow.
        rates = [r["images_per_second"] for r in records if r["event"] == "train"][1:]
        images = self.options.recipe.batch_size if self.options else 1
        seconds = images / statistics.median(rates) if rates else None
        return max((record["step"] for record in records), default=0), seconds


def plan_runs(grid: Grid, datadir: Path, output: Path, options: Options) -> list[TableRun]:
    """Every run that is asked for, teachers ahead of their students; nothing is started.

    Raises UserError if a script or its flags don't exist (tyro's message is above).
    """
    # A row that is asked for needs its teacher, which may need one too.
    wanted = set(options.only or (row.name for row in grid.rows))
    for row in reversed(grid.rows):
        if row.name in wanted and row.teacher:
            wanted.add(row.teacher)
    runs: dict[str, list[TableRun]] = {}
    for row in grid.rows:
        # Rows that are not asked for count for equal compute.
        if row.name not in wanted and grid.equal != "compute":
            continue
        if options.teacher_weights and row.name in grid.teachers:
            row.script, row.weights = "", str(options.teacher_weights)
        seeds = row.seeds or options.seeds or grid.seeds
        taught_by = runs.get(row.teacher, [])
        own = [
            new_run(grid, row, seed, datadir, output, taught_by)
            for seed in (seeds if row.script else (0,))
        ]
        # The same for every seed.
        teacher_cost = taught_by[0].cost if taught_by else None
        teacher_model = teacher_cost.model if teacher_cost else None
        cost = cost_of(own[0].options, teacher_model) if own[0].options else None
        for run in own:
            run.cost = cost
        runs[row.name] = own
    if unknown := wanted - runs.keys():
        raise UserError(f"no row is called {', '.join(sorted(unknown))}")
    # Teachers keep their schedule.
    if grid.equal == "compute":
        students = runs.keys() - grid.teachers
        stretch_to_equal_compute([run for name in students for run in runs[name]])
    return [run for name, row in runs.items() if name in wanted for run in row]


def new_run(
    grid: Grid, row: Row, seed: int, datadir: Path, output: Path, teachers: Sequence[TableRun]
) -> TableRun:
    """A run with its commands: to train, unless the row has weights, and to evaluate."""
    name = f"{row.name}-seed{seed}" if row.script else row.name
    folder = output / name
    weights = Path(row.weights).expanduser()  # unless the row trains its own
    if weights.exists():  # else a name of the hub
        weights = weights.absolute()
    teacher: TableRun | None = None
    parsed: TrainingOptions | None = None
    commands: list[list[str]] = []
    if row.script:
        chosen = dict(grid.options)
        for preset in row.presets:
            chosen |= grid.presets[preset]
        chosen |= row.options | {"datadir": datadir, "output-dir": folder, "seed": seed}
        if teachers:
            # That of the same seed, or the one for all.
            teacher = next((run for run in teachers if run.seed == seed), teachers[0])
            chosen["teacher-weights"] = teacher.weights
        commands = [[row.script, *flags(chosen), "--resume", "auto"]]
        parsed = parse(commands[0])
        suffix = "_best" if grid.weights == "best" else ""
        weights = folder / f"{parsed.network}{suffix}.safetensors"
    measured = {"datadir": datadir, "weights": weights, "json": folder / "eval.json"}
    commands.append([grid.evaluation.script, *flags(grid.evaluation.options | measured)])
    parse(commands[-1])
    where: dict[str, Any] = {"name": name, "folder": folder, "weights": weights}
    return TableRun(row=row, seed=seed, options=parsed, teacher=teacher, commands=commands, **where)


def parse(command: Sequence[str]) -> Any:
    """A script's options, by its own parser: mistakes show before the first run is started.

    Raises UserError if there is no such script, or it doesn't take these flags.
    """
    script, *words = command
    try:
        module = import_module(script.removesuffix(".py").replace("/", "."))
        return cli.parse(get_type_hints(module.main)["options"], words)
    except (ImportError, AttributeError, SystemExit) as error:
        raise UserError(f"{script} can't be run with {shlex.join(words)} ({error})") from error


def stretch_to_equal_compute(students: Sequence[TableRun]) -> None:
    """Give every training as many multiply-accumulates as the most expensive one has.

    Raises UserError if their lengths can't be compared: some in steps, some in epochs.
    """
    recipes = [run.options.recipe for run in students if run.options]
    if len({recipe.max_steps is None for recipe in recipes}) > 1:
        raise UserError("equal compute needs max-steps in every row, or in none")
    most = max((run.cost.macs_in_all for run in students if run.cost), default=0.0)
    for run in students:
        if run.options is None or run.cost is None:
            continue
        recipe = run.options.recipe
        schedule = {
            "max_steps": recipe.max_steps,
            "num_epochs": recipe.num_epochs,
            "lr_decay_epochs": recipe.lr_decay_epochs,
            "validate_every": run.options.run.validate_every,
        }
        longer = most / run.cost.macs_in_all
        run.commands[0] += flags({k: math.ceil(v * longer) for k, v in schedule.items() if v})


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± sample standard deviation."""
    if not values:
        return "–"
    text = format(statistics.mean(values), form)
    return f"{text} ± {statistics.stdev(values):.2f}" if len(values) > 1 else text


def tabulate(grid: Grid, runs: Sequence[TableRun], folder: Path) -> str:
    """Write table.md and table.json from what the runs' folders hold; returns the former."""
    # mIoU in percent by row and seed.
    scores: dict[str, dict[int, float]] = {run.row.name: {} for run in runs}
    for run in runs:
        result = run.result
        if result is not None:
            scores[run.row.name][run.seed] = 100 * result["mean_iou"]
    lines, records = [], []
    lengths = set()
    for row in [row for row in grid.rows if row.name in scores]:
        own = [run for run in runs if run.row is row]
        values, alone = scores[row.name], scores.get(row.baseline, {})
        gains = [value - alone[seed] for seed, value in values.items() if seed in alone]
        cost = own[0].cost
        steps, seconds = own[0].measured()
        if steps and row.name not in grid.teachers:
            lengths.add(steps)
        records.append(
            {
                "row": row.name,
                "miou_by_seed": values,
                "gains": gains,
                "published": row.published,
                "cost": cost and vars(cost),
                "steps": steps,
                "seconds_per_step": seconds,
                "errors": [run.error for run in own if run.error],
            }
        )
        cells = [
            row.label or row.name,
            spread(list(values.values())),
            f"{len(values)} of {len(own)}",
        ]
        cells += [spread(gains, "+.2f"), "–" if row.published is None else f"{row.published:.2f}"]
        if cost is not None:
            cells += [f"{cost.parameters / 1e6:.2f}", f"{cost.macs / 1e9:.2f}"]
            cells += [f"{cost.macs_per_step / 1e9:.1f}", f"{steps:,}"]
            cells += [f"{2e-15 * cost.macs_per_step * steps:.3g}"]
            cells += ["–" if seconds is None else f"{seconds:.3g}"]
        lines.append(cells + ["–"] * (len(HEADS) - len(cells)))
    write_json({"title": grid.title, "rows": records}, folder / "table.json")

    options = grid.evaluation.options
    protocol = PROTOCOLS[options.get("protocol", "paper")]
    rule = ["---", *["---:"] * (len(HEADS) - 1)]
    text = [f"# {grid.title}", "", *(f"| {' | '.join(cells)} |" for cells in (HEADS, rule, *lines))]
    text += ["", f"Mean IoU of the {grid.weights} weights over the classes that occur in "]
    compared = "compute" if grid.equal == "compute" else "steps" if len(lengths) == 1 else ""
    text[-1] += f"{options.get('subset', 'val')}, {protocol}"
    text[-1] += f", at equal {compared}." if compared else ", each row on its own schedule."
    text += [NOTES, *(f"\n{run.name} failed: {run.error}" for run in runs if run.error)]
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text("\n".join(text) + "\n", encoding="utf-8")
    return "\n".join(text)


def main(options: Options) -> None:
    grid = read_grid(options.grid)
    output = (options.output_dir or OUTPUTS / options.grid.stem).expanduser().absolute()
    datadir = (options.datadir or output / "data").expanduser().absolute()
    # Without --datadir, the grid's synthetic scenes are drawn into the table's folder.
    draw: list[list[str]] = []
    if options.datadir is None:
        if grid.scenes is None:
            raise UserError("no data to train on; name the data set's folder by --datadir")
        draw = [["-m", "demo.scenes", *flags(grid.scenes | {"output": datadir})]]
    runs = plan_runs(grid, datadir, output, options)
    if options.dry_run:
        for command in draw + [command for run in runs for command in run.commands]:
            print(f"python {shlex.join(command)}")
        return
    for command in draw:
        if code := subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            sys.exit(code)  # it has said why
    if options.slurm is not None:
        submit([run for run in runs if not run.is_done], output, options.slurm)
    else:
        gpus = [{"CUDA_VISIBLE_DEVICES": gpu.strip()} for gpu in options.gpus.split(",")]
        slots = gpus if options.gpus else [{}]
        run_here(runs, slots, lambda: tabulate(grid, runs, output))
    print(tabulate(grid, runs, output))
    print(f"written to {output}/table.md and table.json")
    if any(run.error for run in runs):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, Options)
