"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from errors import UserError

ROOT = Path(__file__).resolve().parent


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises UserError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"can't make the folder {folder} ({error.strerror}); choose another one"
        ) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends without an error.

    A link is followed: what it points to is replaced.

    Raises:
        UserError: the disk is full, the folder can't be written, or `path` is no file. What was
            there before is untouched.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".{target.name}.{os.getpid()}"
    try:
        if target.exists() and not target.is_file():
            raise UserError(f"can't write {path}, which is a folder or a device; name a file")
        yield temporary
        temporary.replace(target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"can't write {path} ({reason}); nothing there was changed") from error
    finally:
        with suppress(OSError):  # a name that is too long is refused here too
            temporary.unlink(missing_ok=True)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write JSON in one step: the file holds all of it, or what it held before."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file. Raises UserError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); write it again or remove it") from error
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror})") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; write it again or remove it")
    return content
