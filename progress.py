"""Progress of long work: one line on stderr with rate and time left."""

import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
# Its own lock is shared with every process that forks from this one: a killed one may keep it.
tqdm.set_lock(threading.RLock())
# What matters first: the end is cut off where a terminal is narrow.
FORMAT = "{desc}  {bar:10}  {n_fmt}/{total_fmt}  {rate_noinv_fmt}  {remaining} left{postfix}"


class LogLines:
    """A stream for tqdm, where every state of a progress line becomes a line of its own."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_line(title: str, total: int | None, unit: str = "images", **more: Any) -> "tqdm[Any]":
    """A progress line; in a log, where every update stays, there is one each ten seconds."""
    terminal = sys.stderr.isatty()
    seconds = 0.1 if terminal else 10.0
    more |= {"mininterval": seconds, "maxinterval": seconds, "dynamic_ncols": terminal}
    file: Any = sys.stderr if terminal else LogLines()
    return tqdm(desc=title, total=total, unit=f" {unit}", bar_format=FORMAT, file=file, **more)


def end_progress_lines() -> None:
    """Let what is printed next begin at the start of a line, and be the last."""
    for line in list(getattr(tqdm, "_instances", ())):
        line.close()


def track(
    items: Iterable[T], title: str, total: int | None = None, unit: str = "images"
) -> Iterator[T]:
    """Yield the items and show how many of `total` are done."""
    with progress_line(title, total, unit) as line:
        for item in items:
            yield item
            line.update()
