"""What every command shares: typed flags, one clear line for a user's mistake, the device."""

import ctypes
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

# Threads that wait for work sleep instead of spinning: beside another busy process a training step
# on a CPU would take up to ten times as long. It must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import tyro

from errors import UserError
from progress import end_progress_lines

T = TypeVar("T")
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


def run(main: Callable[[T], None], options: type[T]) -> None:
    """Parse the command line into `options`, call `main`, and turn mistakes into exit codes.

    A `UserError` ends in one line on stderr and exit code 2, and so do a path that the system
    refuses, and too little memory; an interrupt ends in exit code 130, a reader of our output that
    has left in 141. Anything else is a bug of ours and keeps its traceback.
    """
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold anything
    try:
        main(parse(options, sys.argv[1:], sys.modules[main.__module__].__doc__))
        sys.stdout.flush()
    except UserError as error:
        _refuse(str(error))
    except (MemoryError, RuntimeError) as error:
        # torch has an exception of its own for a GPU's memory; the host and libraries have texts.
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not out_of_memory and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        _refuse("out of memory; lower --batch-size or --height, or split batches by --accumulate")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        sys.exit(141)
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _refuse("can't write the output (no space left); make room, or send it elsewhere")
        if error.filename is None:
            raise
        _refuse(f"can't use {error.filename} ({error.strerror}); check the path, its permissions")


def _refuse(problem: str) -> NoReturn:
    end_progress_lines()
    rank = os.environ.get("RANK")  # torchrun's
    where = "" if rank is None else f"[rank {rank}] "
    print(f"error: {where}{' '.join(problem.splitlines())}", file=sys.stderr)
    sys.exit(2)


def parse(options: type[T], arguments: Sequence[str], manual: str | None = None) -> T:
    """Arguments as `options`, a dataclass; groups of flags are dataclasses in it.

    Where the options name a preset (they have a method `preset`), that gives the defaults, and the
    arguments are parsed once more.

    Raises SystemExit if there is a mistake in them, or `--help` was asked for; tyro has printed
    it.
    """
    module = sys.modules["__main__"].__spec__
    named: dict[str, Any] = {"description": manual, "args": arguments, "compact_help": True}
    named["config"] = (tyro.conf.OmitArgPrefixes,)
    if module is not None:
        named["prog"] = f"python -m {module.name.removesuffix('.__main__')}"
    parsed = tyro.cli(options, **named)
    preset = parsed.preset() if hasattr(parsed, "preset") else None
    return parsed if preset is None else tyro.cli(options, default=preset, **named)


def find_device(name: str) -> torch.device:
    """The device that a flag names, ready for use; `auto` is a GPU where there is one.

    Raises UserError if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which "meta", that computes nothing, refuses
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name} does not work here ({reason}); use cpu") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # else pinned memory would wake the first GPU as well
    if device.type == "cpu" and sys.platform == "linux":
        # glibc gives large blocks back to the system, which then zeroes as many pages again: an
        # eighth to a quarter of a training step. Kept, they serve the next tensors.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap's end is never given back
    return device
