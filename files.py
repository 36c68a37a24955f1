"""Locks, JSON, and files that are written whole or not at all."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from errors import UserError

ROOT = Path(__file__).resolve().parent
OUTPUTS = ROOT / "outputs"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends without an error.

    Folders above it are made. A link is followed: what it points to is replaced. The block may also
    make a folder, which then becomes a new one.

    Raises UserError if the disk is full, the folder can't be written, or `path` is no file.
    What was there before is untouched.
    """
    target = Path(os.path.realpath(path))
    # Of the same ending, its own for every process and target, and short: names have 255 bytes.
    checksum = zlib.crc32(os.fsencode(target.name))
    temporary = target.parent / f".{os.getpid()}-{checksum:08x}{target.suffix}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():
            raise UserError(f"can't write {path}, which is a folder or a device; name a file")
        yield temporary
        temporary.replace(target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"can't write {path} ({reason}); nothing there was changed") from error
    finally:
        with suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary)
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left of `atomic_write` here; nobody else may be writing."""
    for path in folder.glob(".[0-9]*-????????.*"):
        path.unlink(missing_ok=True)


def acquire(lock: Any, *, wait: bool = False) -> bool:
    """Acquire a FileLock; False if another process has it, and we don't wait.

    A file system without locks lets every process have it. Raises PermissionError.
    """
    from filelock import Timeout  # not everybody who imports this module needs it

    try:
        lock.acquire(blocking=wait)
    except Timeout:
        return False
    except PermissionError:
        raise
    except (NotImplementedError, OSError):
        pass
    return True


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write JSON in one step: the file holds all of it, or what it held before."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: objects that have an event and a step.

    A line that was cut off by a kill is skipped. Raises OSError if there is no such file.
    """
    records = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and {"event", "step"} <= r.keys()]


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file. Raises UserError for other content."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise TypeError(f"it is a {type(content).__name__}")
        return content
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no JSON object ({error}); remove it") from error
