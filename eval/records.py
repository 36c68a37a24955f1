"""The JSON files of a run folder. They are read with care: a killed run or a full disk may have left half of one."""

import json
import os
from pathlib import Path
from typing import Any

from cli import UserError, writing


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file, None if there is no file. Raises UserError if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); write it again or remove it") from error
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror})") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; write it again or remove it")
    return content


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write in one step: the file holds the whole result or what it held before."""
    with writing(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n")


def read_records(path: Path, tail: int | None = None) -> list[dict[str, Any]]:
    """The records of metrics.jsonl: objects with an event and a step. Lines that are none, or cut off, are left out.

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
        if isinstance(record, dict) and isinstance(record.get("event"), str) and isinstance(record.get("step"), int):
            records.append(record)
    return records
