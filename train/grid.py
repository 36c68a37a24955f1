"""A grid: which rows a table has, as a TOML file. train/grids/ has the paper's tables.

    seeds = [0, 1, 2]
    weights = "best"                # which weights are evaluated, and teach: "last" or "best"
    equal = "steps"                 # or "compute": every student has the most expensive one's
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

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import UserError
from files import ROOT


@dataclass(kw_only=True)
class Row:
    """One row of a grid: a script with its flags, or weights that exist."""

    name: str
    label: str = ""
    script: str = ""
    weights: str = ""
    presets: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] | None = None
    teacher: str = ""
    baseline: str = ""
    published: float | None = None


@dataclass(kw_only=True)
class Grid:
    """A grid's content, under the names of its file."""

    title: str
    rows: list[Row]
    evaluation: dict[str, Any]
    seeds: Sequence[int] = (0,)
    weights: str = "last"
    equal: str = "steps"
    options: dict[str, Any] = field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    scenes: dict[str, Any] | None = None


def read_grid(name: Path) -> Grid:
    """A TOML file, or one of train/grids/. Raises UserError for unknown or missing keys."""
    places = (name, ROOT / "train" / "grids" / f"{name}.toml")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        known = ", ".join(sorted(grid.stem for grid in places[1].parent.glob("*.toml")))
        raise UserError(f"no grid at {name}; name a TOML file, or one of {known}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        content["rows"] = [Row(**row) for row in content["rows"]]
        return Grid(**{"title": path.stem} | content)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no grid ({error}); see the head of train/grid.py") from error


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
