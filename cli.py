"""What every command of the project shares: typed flags, and one clear line for a user's mistake."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

T = TypeVar("T")


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, and what to do."""


def run(main: Callable[[T], None], options: type[T]) -> None:
    """Parse the command line into `options`, call `main`, and turn mistakes into exit codes.

    A `UserError` ends in one line on stderr and exit code 2, an interrupt in exit code 130.
    Anything else is a bug of ours and keeps its traceback.
    """
    try:
        main(tyro.cli(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
