"""A grid: which rows a table has, as a TOML file. train/grids/ has the paper's tables.

    seeds = [0, 1, 2]
    weights = "best"                # which weights are evaluated, and teach: "last" or "best"
    equal = "compute"               # each student trains as much as the most expensive one; or
                                    # "steps", the default: as its flags say
    [options]                       # flags of every row, as the scripts have them
    height = 512
    [presets.eighth]                # flags of the rows that say presets = ["eighth"]
    subset-every = 8
    [evaluation]
    script = "eval/eval_cityscapes_iou.py"
    options = { subset = "val" }
    [[rows]]
    name = "teacher"
    script = "train/teacher.py"     # or weights = "FILE": evaluated, taught from, not trained
    seeds = [0]                     # one teacher for the students of all seeds
    [[rows]]
    name = "TransKDBase"
    script = "train/TransKDBase.py"
    teacher = "teacher"             # the row above that teaches
    baseline = "student"            # the row that the gain is measured against, seed by seed
    published = 68.58
    options = { embed = 5 }         # this row's own flags

Further keys: title, a row's label, and [scenes], the flags of demo.scenes for data that is drawn
first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from errors import UserError
from files import ROOT


class Row(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One row of a grid: a script with its flags, or weights that exist."""

    name: str
    label: str = ""
    script: str = ""
    weights: str = ""
    presets: Sequence[str] = ()
    options: dict[str, Any] = {}
    seeds: Sequence[int] = ()
    teacher: str = ""
    baseline: str = ""
    published: float | None = None


class Evaluation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The script that scores every run, with its flags."""

    script: str
    options: dict[str, Any] = {}


class Grid(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A grid's content, under the names of its file."""

    title: str = ""
    rows: list[Row]
    evaluation: Evaluation
    seeds: Sequence[int] = (0,)
    weights: Literal["last", "best"] = "last"
    equal: Literal["steps", "compute"] = "steps"
    options: dict[str, Any] = {}
    presets: dict[str, dict[str, Any]] = {}
    scenes: dict[str, Any] | None = None

    @property
    def teachers(self) -> set[str]:
        """The names of the rows that teach."""
        return {row.teacher for row in self.rows if row.teacher}

    def __post_init__(self) -> None:
        """Raise ValueError for names that stand for nothing, or for two rows."""
        if not self.seeds:
            raise ValueError("there are no seeds")
        names = [row.name for row in self.rows]
        for number, row in enumerate(self.rows):
            if bool(row.script) == bool(row.weights):
                raise ValueError(f"row {row.name}: it needs a script, or weights, and not both")
            if row.name in names[:number]:
                raise ValueError(f"two rows are called {row.name}")
            if row.teacher and row.teacher not in names[:number]:
                raise ValueError(f"row {row.name}: its teacher {row.teacher} is no row above it")
            if row.baseline and row.baseline not in names:
                raise ValueError(f"row {row.name}: its baseline {row.baseline} is no row")
            if unknown := set(row.presets) - self.presets.keys():
                raise ValueError(f"row {row.name}: no preset is called {unknown.pop()}")


def read_grid(name: Path) -> Grid:
    """A TOML file, or one of train/grids/. Raises UserError for unknown or missing keys."""
    folder = ROOT / "train" / "grids"
    path = next((place for place in (name, folder / f"{name}.toml") if place.is_file()), None)
    if path is None:
        known = ", ".join(sorted(grid.stem for grid in folder.glob("*.toml")))
        raise UserError(f"no grid at {name}; name a TOML file, or one of {known}")
    try:
        grid = msgspec.toml.decode(path.read_text(encoding="utf-8-sig"), type=Grid)
    except ValueError as error:
        raise UserError(f"{path} is no grid ({error}); see the head of train/grid.py") from error
    grid.title = grid.title or path.stem
    return grid


def flags(options: dict[str, Any]) -> list[str]:
    """{"lr": 1e-3, "flip": False} as --lr 0.001 --no-flip."""
    words: list[str] = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
