"""What every command shares: typed flags, one clear line for a user's mistake, the device, whole files."""

import ctypes
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any, NoReturn, TypeVar

import torch
import tyro

from errors import UserError

T = TypeVar("T")
MANY = 1000  # processes; as many and more are a mistake that could bring a machine down


def run(main: Callable[[T], None], options: type[T]) -> None:
    """Parse the command line into `options`, call `main`, and turn mistakes into exit codes.

    The module's docstring is the manual that `--help` shows. A `UserError` ends in one line on stderr and exit
    code 2, and so do a path that the system refuses, a number that is too large and too little memory; an interrupt
    ends in exit code 130, a reader of our output that has left in 141. Anything else is a bug of ours and keeps its
    traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a file's name may hold what a terminal can't show
    try:
        main(parse(options, sys.argv[1:], sys.modules[main.__module__].__doc__))
        sys.stdout.flush()
    except UserError as error:
        _refuse(str(error))
    except (MemoryError, RuntimeError) as error:
        # torch has an exception of its own for a GPU's memory, and none for the host's
        if not isinstance(
            error, MemoryError | torch.OutOfMemoryError
        ) and "can't allocate memory" not in str(error):
            raise
        _refuse("out of memory; lower --batch-size or --height, or split batches by --accumulate")
    except OverflowError as error:
        _refuse(f"a number is too large ({error}); give a smaller one")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `… | head` has read enough
        _forget_output()
        sys.exit(141)
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:  # our output's
            _forget_output()
            _refuse("can't write the output (no space left); make room, or send it elsewhere")
        if error.filename is None:
            raise
        _refuse(
            f"can't use {error.filename} ({error.strerror}); check the path and its permissions"
        )


def _forget_output() -> None:
    """Else the interpreter's last flush would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(problem: str) -> NoReturn:
    """Say it in one line, and end."""
    rank = os.environ.get("RANK")  # torchrun's
    where = "" if rank is None else f"[rank {rank}] "
    print(f"error: {where}{' '.join(problem.splitlines())}", file=sys.stderr)
    sys.exit(2)


def parse(options: type[T], arguments: Sequence[str], manual: str | None = None) -> T:
    """A command line's arguments as `options`, which choose their defaults by them where they have a method `defaults`.

    Raises:
        UserError: there is a mistake in them; tyro's box becomes one line.
        SystemExit: `--help` was among them, and was printed with `manual` above it.
    """
    box = io.StringIO()
    choose: Any = getattr(options, "defaults", None)
    try:
        with redirect_stderr(box):
            default: T | None = choose(arguments) if choose else None
            return tyro.cli(  # type: ignore[return-value]
                options, prog=_called(), args=arguments, description=manual, default=default
            )
    except SystemExit as end:
        if not end.code:
            sys.stdout.flush()
            raise  # --help
        title, *text = (line.strip("╭─╮│╰╯ ") for line in box.getvalue().splitlines())
        if title == "Required options":
            above_rule = box.getvalue().split("│ ───")[0]
            # Their help stands further in; a line of choices may go on without a dash or brace.
            lacking = re.findall(r"^│ {5}([-{]\S+)", above_rule, re.MULTILINE)
            raise UserError(
                f"{', '.join(lacking)} must be given (--help shows all flags)"
            ) from None
        parts = " ".join(line or "\n" for line in text).split("\n")  # between rules
        told = "; ".join(
            part.strip() for part in parts if part.strip() and "full helptext" not in part
        )
        if not told.lower().startswith(title.lower()):
            told = f"{title}: {told}"
        raise UserError(f"{told[0].lower()}{told[1:]} (--help shows all flags)") from None


def _called() -> str | None:
    """How this program is called where that is not by its file's name."""
    module = sys.modules["__main__"].__spec__
    return f"python -m {module.name.removesuffix('.__main__')}" if module else None


def find_device(name: str) -> torch.device:
    """The device that a flag names, ready for use; `auto` is a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which "meta", that computes nothing, refuses
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} does not work here; use cpu or auto") from error
    if (
        device.type == "cuda" and device.index is not None
    ):  # else pinned memory would wake the first GPU as well
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let glibc keep the blocks that tensors leave, for the next ones.

    By default it gives every large one back to the system, which then zeroes as many pages again for the next:
    an eighth to a quarter of a training step's time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap's end is never given back
