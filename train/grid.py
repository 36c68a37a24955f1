"""What a grid describes: rows of a table, and for each row and seed a run with its commands and how far it has come.

The file's form is told by train/table.py. Flags are those of the scripts and are parsed by the scripts' own options, so
that a mistake shows before anything is started.
"""

import fcntl
import functools
import hashlib
import importlib
import io
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import cli
from datasets import find_layout, open_split, synthetic
from errors import UserError
from eval import eval_iou
from eval.options import IoUOptions
from eval.records import EVALUATION, fits, read_records
from files import read_json, write_json
from models import SegmentationModel, load_model
from models.checkpoints import weights_file
from train.optimisation import Plan
from train.options import ROOT, TrainingOptions
from train.run_folder import FREE, holds_run

T = TypeVar("T")
GRIDS = ROOT / "train" / "grids"
RESERVED = (
    "lock",
    "data",
    "table.md",
    "table.json",
)  # what the table's folder holds beside the runs
ANY_DATASET = "eval/eval_iou.py"  # takes the data set as a flag
TAKEN = ("seed", "output_dir", "resume", "override", "datadir")  # flags that the table gives
MEASURED = ("datadir", "weights", "json")  # and of the evaluation's
SCHEDULE = ("num_epochs", "max_steps")  # a run may go on to more of them, but not back
FILES = (
    "teacher_weights",
    "student_weights",
    "train_list",
)  # options that may move, but not change their content


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: a script with its flags, or weights that exist."""

    name: str
    label: str
    script: str = ""
    weights: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    teacher: str = ""
    baseline: str = ""
    published: float | None = None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows by name, in the table's order, and what they share."""

    title: str
    seeds: tuple[int, ...]
    weights: Literal["last", "best"]
    eval_script: str
    eval_flags: Mapping[str, Any]
    datadir: Path | None
    scenes: Mapping[str, Any] | None
    rows: Mapping[str, Row]

    def seeds_of(self, row: Row) -> tuple[int, ...]:
        return self.seeds if row.seeds is None else row.seeds


class Section:
    """A table of the TOML file, from which keys are taken with their type until none is left."""

    TYPES: Mapping[type, str] = {str: "a string", list: "a list", float: "a number"}

    def __init__(self, where: str, content: Any) -> None:
        self.where = where
        if not isinstance(content, dict):
            raise UserError(f"{where} must be a table of keys and values")
        self.content = dict(content)

    def take(self, key: str, kind: type[T]) -> T | None:
        """A value, None where there is none."""
        value = self.content.pop(key, None)
        fits = isinstance(value, kind) or (kind is float and type(value) is int)
        if value is not None and not fits:
            raise UserError(f"{self.where}: {key} is {value!r}; it must be {self.TYPES[kind]}")
        return value

    def flags(self, key: str) -> dict[str, Any]:
        """A table of flags, under the names their options have in Python."""
        found = Section(f"{self.where}: {key}", self.content.pop(key, {})).content
        return {name.replace("-", "_"): value for name, value in found.items()}

    def seeds(self) -> tuple[int, ...] | None:
        values = self.take("seeds", list)
        if values is None:
            return None
        if (
            not values
            or not all(type(value) is int for value in values)
            or len({*values}) < len(values)
        ):
            raise UserError(
                f"{self.where}: seeds is {values}; it must be a list of different integers"
            )
        return tuple(values)

    def end(self) -> None:
        if self.content:
            raise UserError(
                f"{self.where}: unknown key {', '.join(self.content)}; train/table.py --help names all"
            )


def read_grid(path: Path) -> Grid:
    """The grid in a TOML file, or of that name in train/grids/.

    Raises:
        UserError: it can't be read, or a key is unknown, missing or of another type. Flags are looked at by `plan`.
    """
    found = next((p for p in (path, GRIDS / path, GRIDS / f"{path}.toml") if p.is_file()), None)
    if found is None:
        known = ", ".join(sorted(p.stem for p in GRIDS.glob("*.toml")))
        raise UserError(f"no grid at {path}; name a TOML file, or one of {known}")
    try:
        top = Section(found.name, tomllib.loads(found.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{found} is no TOML that can be read ({error})") from error
    evaluation = Section(f"{found.name}: evaluation", top.content.pop("evaluation", {}))
    presets = Section(f"{found.name}: presets", top.content.pop("presets", {}))
    common, groups = (
        top.flags("options"),
        {name: presets.flags(name) for name in list(presets.content)},
    )
    rows: dict[str, Row] = {}
    for i, content in enumerate(top.take("rows", list) or (), start=1):
        row = read_row(Section(f"{found.name}: row {i}", content), common, groups, rows)
        rows[row.name] = row
    datadir, weights = top.take("datadir", str), top.take("weights", str) or "last"
    if weights not in ("last", "best"):
        raise UserError(f'{found.name}: weights is {weights!r}; it must be "last" or "best"')
    grid = Grid(
        title=top.take("title", str) or found.stem,
        seeds=top.seeds() or (0,),
        weights="best" if weights == "best" else "last",
        eval_script=evaluation.take("script", str) or "",
        eval_flags=evaluation.flags("options"),
        datadir=Path(datadir).expanduser() if datadir else None,
        scenes=top.flags("scenes") if "scenes" in top.content else None,
        rows=rows,
    )
    evaluation.end()
    if given := [key for key in MEASURED if key in grid.eval_flags]:
        raise UserError(f"{evaluation.where}: {given[0]} is given by the table; leave it out")
    top.end()
    if not rows:
        raise UserError(f"{found.name}: there are no [[rows]]")
    for row in rows.values():
        if row.baseline and row.baseline not in rows:
            raise UserError(
                f"{found.name}: row {row.name}: its baseline {row.baseline!r} is no row"
            )
    return grid


def read_row(
    section: Section, common: Mapping[str, Any], groups: Mapping[str, Any], above: Mapping[str, Row]
) -> Row:
    """One of `[[rows]]`; `above` are those before it."""
    name = section.take("name", str) or ""
    taken = (
        name in above or name in RESERVED or re.search(r"-seed\d+$", name)
    )  # which the runs' folders end in
    if taken or not re.fullmatch(r"[\w+][\w.+-]*", name):
        raise UserError(
            f"{section.where}: its name {name!r} must be of letters, digits, - and _, no other row's, not "
            f"{', '.join(RESERVED)}, and not end in -seedN"
        )
    section.where += f" ({name})"
    script, weights = section.take("script", str) or "", section.take("weights", str)
    if bool(script) == bool(weights):
        raise UserError(f"{section.where}: it needs either a script or weights")
    flags = dict(common)
    for preset in (section.take("presets", list) if script else None) or ():
        if not isinstance(preset, str) or preset not in groups:
            raise UserError(f"{section.where}: there is no [presets.{preset}]")
        flags |= groups[preset]
    flags = flags | section.flags("options") if script else {}
    if given := [key for key in TAKEN if key in flags]:
        raise UserError(
            f"{section.where}: {given[0].replace('_', '-')} is given by the table; leave it out"
        )
    row = Row(
        name=name,
        label=section.take("label", str) or name,
        script=script,
        weights=Path(weights).expanduser() if weights else None,
        flags=flags,
        teacher=(section.take("teacher", str) if script else None) or "",
        baseline=section.take("baseline", str) or "",
        published=section.take("published", float),
        seeds=section.seeds() if script else (0,),
    )
    section.end()
    if row.teacher and row.teacher not in above:
        raise UserError(
            f"{section.where}: its teacher {row.teacher!r} must be one of the rows above it"
        )
    return row


@dataclass(kw_only=True, eq=False)
class Job:
    """One run of one row.

    Attributes:
        options: the script's, None for a row whose weights are given.
        training, evaluation: the commands without `python`, training without --resume.
        dataset, datadir: what is evaluated on.
        measure: what the evaluation's figure depends on, beside weights and data.
    """

    row: Row
    seed: int
    folder: Path
    teacher: "Job | None"
    options: TrainingOptions | None
    weights: Path
    training: list[str]
    evaluation: list[str]
    dataset: str
    datadir: Path
    measure: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.row.name} seed {self.seed}" if self.options else self.row.name

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return holds_run(self.folder)

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def locked(self) -> bool:
        """Whether a training that is not ours is at work in the folder, such as one that outlived its table."""
        try:
            with (self.folder / "lock").open("r+") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # mostly that there is no such file
            return isinstance(error, BlockingIOError)
        return False

    def source(self) -> dict[str, Any]:
        """What decides the weights beyond the options that options.json is compared in: steps, and files' content."""
        if self.options is None:
            return {"weights": digest(self.weights)}
        known = asdict(self.options)
        return {name: known[name] for name in SCHEDULE} | {
            name: digest(known.get(name)) for name in FILES
        }

    def measured(self) -> dict[str, Any]:
        """What decides the evaluation's figure beyond the weights."""
        split = split_facts(self.dataset, self.datadir, self.measure["subset"])
        return self.measure | {"data": split and split.identity}

    def record(self, *, evaluated: bool) -> None:
        """Note that the training, or the evaluation too, came to its end."""
        done = {"source": self.source(), "evaluation": self.measured() if evaluated else None}
        write_json(done, self.folder / "done.json")

    def standing(self) -> Literal["new", "begun", "trained", "finished"]:
        """How far it has come.

        Raises:
            UserError: its folder holds a run that the grid no longer describes.
        """
        path, source = self.folder / "done.json", self.source()
        done = read_json(path)
        if done is not None and not isinstance(done.get("source"), dict):
            raise UserError(f"{self}: {short(path)} is damaged; remove it")
        if (done or self.begun) and (
            problem := self.problem(source, done["source"] if done else {})
        ):
            raise UserError(
                f"{self} was trained {problem}: remove {short(self.folder)}, or undo the change"
            )
        if done is None:
            return "begun" if self.begun else "new"
        if self.options is None or (source == done["source"] and self.weights.is_file()):
            evaluated = self.result() is not None and done == {
                "source": source,
                "evaluation": self.measured(),
            }
            return "finished" if evaluated else "trained"
        return "begun" if self.begun else "new"

    def problem(self, source: Mapping[str, Any], done: Mapping[str, Any]) -> str | None:
        """Why what has been trained is not what the grid says; `done` is the source of a training that has ended.

        A teacher that is not there yet may turn out to be the one that was.
        """
        if self.options is None:
            return None
        before, now = read_json(self.folder / "options.json"), self.options.as_json()
        if before is None:
            return "with options that nobody knows, options.json is missing"
        # the rate of --schedule step depends on how many steps there are
        free = FREE.difference(SCHEDULE) if self.options.schedule == "step" else FREE
        different = sorted(
            key for key in now.keys() & before.keys() - free if now[key] != before[key]
        )
        if different:
            return f"with {', '.join(f'{key} {before[key]} instead of {now[key]}' for key in different)}"
        every, list_file = self.options.subset_every, self.options.train_list
        split = split_facts(self.options.dataset, self.options.datadir, "train", every, list_file)
        if split and split.identity != before.get("data", split.identity):
            return f"on other data than {self.options.datadir} holds now"
        for name in FILES:
            if source[name] and source[name] != done.get(name, source[name]):
                return f"with another {name.replace('_', ' ')}"
        if split:
            planned = Plan.of(
                self.options, split.images, math.ceil(split.images / self.options.batch_size)
            ).steps
            if (step := last_record(self.folder).get("step", 0)) > planned:
                return f"for {step} steps instead of {planned}"
        return None

    def commands(self, standing: str) -> list[list[str]]:
        """What a run of that standing still has to do."""
        training = {"new": [self.training], "begun": [[*self.training, "--resume"]]}.get(
            standing, []
        )
        return [] if standing == "finished" else [*filter(None, training), self.evaluation]

    def result(self) -> dict[str, Any] | None:
        """What the evaluation wrote, None where that is no mean IoU."""
        try:
            found = read_json(self.folder / "eval.json") or {}
        except UserError:
            return None
        return (
            found if isinstance(found.get("mean_iou"), float) and fits(found, EVALUATION) else None
        )

    def score(self) -> dict[str, Any] | None:
        """The result of a run that is finished as the grid describes it."""
        try:
            return self.result() if self.standing() == "finished" else None
        except UserError:
            return None


def plan(grid: Grid, datadir: Path, output: Path) -> list[Job]:
    """Every run of the grid, seed by seed; nothing is started.

    Raises:
        UserError: a script or flag does not exist, a value is out of range, or given weights can't be read; names the
            row.
    """
    jobs: dict[tuple[str, int], Job] = {}
    for row in grid.rows.values():
        for seed in grid.seeds_of(row):
            teacher = find_teacher(row, seed, jobs) if row.teacher else None
            jobs[row.name, seed] = new_job(grid, row, seed, datadir, output, teacher)
    return sorted(jobs.values(), key=lambda job: job.seed)


def find_teacher(row: Row, seed: int, jobs: Mapping[tuple[str, int], Job]) -> Job:
    """The run that teaches a row: of the same seed, or the only one there is."""
    runs = [job for (name, _), job in jobs.items() if name == row.teacher]
    same = [job for job in runs if job.seed == seed]
    if not same and len(runs) != 1:
        raise UserError(
            f"row {row.name}: its teacher {row.teacher} has no seed {seed}; give it the seed, or one alone"
        )
    return (same or runs)[0]


def new_job(
    grid: Grid, row: Row, seed: int, datadir: Path, output: Path, teacher: Job | None
) -> Job:
    folder = output / (f"{row.name}-seed{seed}" if row.script else row.name)
    where, options, training, dataset = f"row {row.name}", None, [], evaluated(grid)
    if seed not in range(2**32):
        raise UserError(f"{where}: seed {seed} is out of range; seeds begin at 0")
    if row.script:
        flags = dict(row.flags) | {
            "datadir": short(datadir),
            "seed": seed,
            "output_dir": short(folder),
        }
        if teacher is not None:
            flags["teacher_weights"] = short(teacher.weights)
        options = row_options(row, flags)
        if options.dataset != dataset:
            raise UserError(
                f"{where}: it is trained on {options.dataset}; {grid.eval_script} evaluates on {dataset}"
            )
        training = [short(ROOT / row.script), *words(flags)]
        weights = (
            folder / f"{options.network}{'_best' if grid.weights == 'best' else ''}.safetensors"
        )
    else:
        assert row.weights is not None
        weights = row.weights
        given_model(where, weights)
    paths = {"datadir": datadir, "weights": weights, "json": folder / "eval.json"}
    measured = dict(grid.eval_flags) | {name: short(path) for name, path in paths.items()}
    known = eval_iou.Options if grid.eval_script == ANY_DATASET else IoUOptions
    evaluation = asdict(parse("evaluation", known, words(measured)))
    decides = {name: evaluation[name] for name in ("subset", "height", "protocol")}
    return Job(
        row=row,
        seed=seed,
        folder=folder,
        teacher=teacher,
        options=options,
        weights=weights,
        training=training,
        evaluation=[short(ROOT / grid.eval_script), *words(measured)],
        dataset=dataset,
        datadir=datadir,
        measure=decides | {"script": grid.eval_script, "weights": weights.name},
    )


def evaluated(grid: Grid) -> str:
    """The data set that the evaluation's script is for, or that it is given by its options."""
    match = re.fullmatch(r"eval/eval_(?:(\w+)_)?iou\.py", grid.eval_script)
    if match is None or not (ROOT / grid.eval_script).is_file():
        raise UserError(
            f"evaluation: script is {grid.eval_script!r}; name one like eval/eval_cityscapes_iou.py"
        )
    name = match[1] or grid.eval_flags.get("dataset")
    if name is None:
        raise UserError(f"evaluation: {grid.eval_script} needs a dataset among its options")
    return find_layout(str(name)).name


@functools.cache
def given_model(where: str, weights: Path) -> SegmentationModel:
    """The network in a file, without its numbers. It is read once: what happens to the file later stops no table."""
    try:
        return load_model(weights).to("meta")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


class Split(NamedTuple):
    """What a split's folder holds."""

    identity: str
    """Names and sizes of its files, as a training's options.json has them."""
    images: int


@functools.cache
def split_facts(
    dataset: str, datadir: Path, subset: str, every: int = 1, list_file: Path | None = None
) -> Split | None:
    """A split, None before the data is drawn.

    It is looked at once: a table of many runs would spend long on it after every run.
    """
    if not datadir.is_dir():
        return None
    split = open_split(dataset, datadir, subset, every=every, list_file=list_file, cache=False)
    return Split(split.identity(), len(split))


def row_options(row: Row, flags: Mapping[str, Any]) -> TrainingOptions:
    """Flags as the options of a row's script, one of this repository."""
    where, script = f"row {row.name}", row.script
    if not re.fullmatch(r"train/\w+\.py", script) or not (ROOT / script).is_file():
        raise UserError(f"{where}: there is no script {script}; name one like train/student.py")
    found = getattr(
        importlib.import_module(script.removesuffix(".py").replace("/", ".")), "Options", None
    )
    if not (isinstance(found, type) and issubclass(found, TrainingOptions)):
        raise UserError(f"{where}: {script} trains nothing; name a script like train/student.py")
    return parse(where, found, words(flags))


def parse(where: str, options: type[T], arguments: Sequence[str]) -> T:
    """Arguments as a script would understand them; a mistake names the row."""
    try:
        with redirect_stdout(io.StringIO()):
            return cli.parse(options, arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except SystemExit:
        raise UserError(f"{where}: an option asks for help or the like; leave it out") from None


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them: {"lr": 1e-3, "flip": False} as --lr 0.001 --no-flip."""
    result = []
    for key, value in flags.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{name}" if value else f"--no-{name}")
        else:
            result += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return result


def scene_options(grid: Grid, datadir: Path) -> synthetic.Options | None:
    """What is drawn before a grid on drawn scenes starts."""
    if grid.scenes is None:
        return None
    return parse("scenes", synthetic.Options, words(dict(grid.scenes) | {"output": datadir}))


def with_teacher(grid: Grid, weights: Path) -> Grid:
    """The grid with a trained teacher in the place of the rows that teach as such a network.

    Raises:
        UserError: there is none.
    """
    holds = given_model("--teacher-weights", weights).name
    wanted = {
        row.teacher: getattr(row_options(row, {**row.flags, "datadir": "."}), "teacher_model", None)
        for row in grid.rows.values()
        if row.teacher and row.script
    }
    taught = [name for name, model in wanted.items() if model == holds]
    if not taught:
        teachers = (
            ", ".join(f"{name} is {model}" for name, model in wanted.items()) or "none is needed"
        )
        raise UserError(
            f"--teacher-weights {weights} holds {holds}, which is no teacher of this grid ({teachers})"
        )

    def given(row: Row) -> Row:
        return replace(row, script="", weights=weights, flags={}, teacher="", seeds=(0,))

    return replace(
        grid, rows={name: given(row) if name in taught else row for name, row in grid.rows.items()}
    )


def seeds_on_disk(grid: Grid, output: Path) -> set[int]:
    """Seeds that rows have folders of, in earlier calls perhaps with other --seeds."""
    names = "|".join(re.escape(row.name) for row in grid.rows.values() if row.seeds is None)
    found = (re.fullmatch(rf"(?:{names})-seed(\d+)", path.name) for path in output.glob("*-seed*"))
    return {int(match[1]) for match in found if match}


def short(path: Path | str) -> str:
    """A path as seen from here, where it lies below."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def digest(path: Path | None) -> str | None:
    """Hash of a file's content, or of the weights' in a folder; None where there are none."""
    file = path and weights_file(path)
    return _digest(file, file.stat().st_mtime_ns) if file and file.is_file() else None


@functools.cache
def _digest(path: Path, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:20]


def last_record(folder: Path, event: str = "") -> dict[str, Any]:
    """The last record of metrics.jsonl, or the last of a kind; only the end of a long file is read."""
    path = folder / "metrics.jsonl"
    records = read_records(path, tail=2**16) if path.is_file() else []
    return next((record for record in reversed(records) if event in ("", record["event"])), {})
