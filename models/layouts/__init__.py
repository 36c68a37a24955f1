"""How other libraries name a network's parameters: one file each, against our names, which are the published ones."""

import re
from collections.abc import Iterable

from torch import Tensor

State = dict[str, Tensor]


def rename(state: State, table: Iterable[tuple[str, str]], stage: int) -> State:
    """Every module after the table's rule (old, new) for it; keys that no rule names stay, for loading to refuse.

    In a rule {i} is a stage, to whose number `stage` is added (ours count from 1, others from 0), and {j} a block.
    """
    patterns = [
        (
            re.compile(
                re.escape(old).replace(r"\{i\}", r"(?P<i>\d)").replace(r"\{j\}", r"(?P<j>\d+)")
            ),
            new,
        )
        for old, new in table
    ]
    return {_rename(key, patterns, stage): value for key, value in state.items()}


def _rename(key: str, patterns: list[tuple[re.Pattern[str], str]], stage: int) -> str:
    module, _, leaf = key.rpartition(".")
    for pattern, new in patterns:
        if match := pattern.fullmatch(module):
            numbers: dict[str, int | str] = {**match.groupdict()}
            if "i" in numbers:
                numbers["i"] = int(numbers["i"]) + stage
            return f"{new.format(**numbers)}.{leaf}"
    return key


def swapped(table: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The table for the way back."""
    return tuple((new, old) for old, new in table)
