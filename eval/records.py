"""The JSON files of a run folder. They are read with care: a killed run or a full disk may have left half of one."""

import json
import os
from pathlib import Path
from typing import Any

from errors import UserError

SCORE = float | int | None
SCORES: dict[Any, Any] = {"mean_iou": SCORE, "per_class": {...: SCORE}}
EVALUATION: dict[Any, Any] = SCORES | {
    **dict.fromkeys(("dataset", "datadir", "subset", "weights", "protocol"), str),
    "height": int,
    "per_image": {...: SCORE},
    "conditions": {...: SCORES},
    "confusion": [[int | float]],
}
"""The form of eval.json, see `fits`."""
RECORD: dict[Any, Any] = SCORES | {
    **dict.fromkeys(("step", "epoch", "total_steps"), int),
    "event": str,
    "time": float | int,
    "losses": {...: float | int},
    "versions": {...: str},
}
"""The form of a line of metrics.jsonl."""


def fits(content: object, form: Any) -> bool:
    """Whether JSON has a form: a type, [the form of each item], {key: of its value, where it is there; ...: of any}."""
    if isinstance(form, dict):
        others = form.get(..., object)
        return isinstance(content, dict) and all(
            fits(item, form.get(key, others)) for key, item in content.items()
        )
    if isinstance(form, list):
        return isinstance(content, list) and all(fits(item, form[0]) for item in content)
    return isinstance(content, form)


def read_records(path: Path, tail: int | None = None) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, which have an event and a step. Lines that are none, or cut off, are left out.

    `tail`: read the last bytes alone.

    Raises:
        UserError: there is no such file, or it can't be read.
    """
    try:
        with path.open("rb") as file:
            if tail is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - tail))
            lines = file.read().splitlines()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} is missing; name the folder of a training run") from error
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror})") from error
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # of which UnicodeDecodeError is one
            continue
        if fits(record, RECORD) and {"event", "step"} <= record.keys():
            records.append(record)
    return records
