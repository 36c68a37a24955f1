"""The one exception whose message is meant for the user."""

from importlib.util import find_spec


class UserError(Exception):
    """Something the user can put right. Its message is one line: what is wrong, and what to do."""


def require(package: str, install: str) -> None:
    """Raise UserError, with what pip is to install, if an optional package is missing."""
    if find_spec(package) is None:
        raise UserError(f"{package} is not installed; pip install {install}")
