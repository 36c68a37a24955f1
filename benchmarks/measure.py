"""Times taken in turn, peaks of memory, and the table that shows them."""

import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from rich.table import Table

Action = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name, other: what is measured, and whom ours is compared with.
        ours, theirs: seconds or bytes of every repetition; empty where there is none.
        target: for time theirs / ours at least, for memory ours / theirs at most.
        note: more about it, or why there are no numbers.
    """

    name: str
    other: str
    what: Literal["time", "memory"] = "time"
    ours: Sequence[float] = ()
    theirs: Sequence[float] = ()
    target: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times faster ours is, or the share of the memory that ours takes."""
        if not self.ours or not self.theirs:
            return None
        ours, theirs = median(self.ours), median(self.theirs)
        return theirs / ours if self.what == "time" else ours / theirs

    @property
    def reached(self) -> bool | None:
        """Whether the target is."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio >= self.target if self.what == "time" else self.ratio <= self.target

    def as_json(self) -> dict[str, Any]:
        """All fields, with the medians' ratio."""
        return asdict(self) | {"ratio": self.ratio, "reached": self.reached}


def table(rows: Sequence[Row], caption: str) -> Table:
    """All rows: ratio and target first, then the medians."""
    result = Table(caption=caption, caption_justify="left")
    for column in ("", "ratio", "target", "ours", "theirs", "compared with", ""):
        right = column in ("ratio", "ours", "theirs")
        result.add_column(column, justify="right" if right else "left")
    for row in rows:
        times = row.what == "time"
        ratio = "–" if row.ratio is None else f"{row.ratio:.3g}×"
        target = "" if row.target is None else f"{'≥' if times else '≤'} {row.target:g}×"
        target += {True: " ✓", False: " ✗", None: ""}[row.reached]
        amounts = [amount(values, row.what) for values in (row.ours, row.theirs)]
        result.add_row(row.name, ratio, target, *amounts, row.other, row.note)
    return result


def amount(values: Sequence[float], what: str) -> str:
    """The median in seconds or bytes, for people."""
    if not values:
        return "–"
    value = median(values)
    if what == "memory":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def in_turn(ours: Action, theirs: Action, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each, ours, theirs, ours, theirs …, after one round that doesn't count."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for action, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            action()
            taken.append(time.perf_counter() - start)
    return times[0][1:], times[1][1:]


def apart(
    ours: Callable[[], Action],
    theirs: Callable[[], Action],
    device: str,
    rounds: int,
    calls: int = 1,
) -> tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]]:
    """Each side in a process of its own, where it is built, in turn; one round doesn't count.

    Returns:
        Seconds of every call of both; and the most bytes that each took: of the GPU's memory, or
        by which its resident memory rose since before it was built (on Linux alone). Nothing of a
        side for which the GPU has too little memory.
    """
    threads = torch.get_num_threads()
    context = get_context("spawn")
    times: tuple[list[float], list[float]] = ([], [])
    peaks: tuple[list[float], list[float]] = ([], [])
    with ProcessPoolExecutor(1, context) as our_process, ProcessPoolExecutor(1, context) as other:
        sides = []
        for index, (process, build) in enumerate(((our_process, ours), (other, theirs))):
            with suppress(torch.OutOfMemoryError):
                process.submit(_build, build, threads).result()
                process.submit(_measure, device, calls).result()
                sides.append((process, times[index], peaks[index]))
        for _ in range(rounds):
            for process, taken, peak in sides:
                seconds, peak[:] = process.submit(_measure, device, calls).result()
                taken += seconds
    return times, peaks


_action: Action  # of a process of `apart`
_before: list[float]  # its memory, in bytes


def _build(build: Callable[[], Action], threads: int) -> None:
    global _action, _before
    torch.set_num_threads(threads)
    _before = resident_bytes("VmRSS")
    _action = build()


def _measure(device: str, calls: int) -> tuple[list[float], list[float]]:
    """Seconds of every call, and the peak of memory, as `apart` returns them.

    A GPU measures itself, from the end of a call to that of the next.
    """
    if device == "cpu":
        clocks = [time.perf_counter()]
        for _ in range(calls):
            _action()
            clocks.append(time.perf_counter())
        highest = resident_bytes("VmHWM")
        grown = [after - before for before, after in zip(_before, highest, strict=True)]
        return [after - before for before, after in pairwise(clocks)], grown
    torch.cuda.reset_peak_memory_stats()  # compiling took memory too
    # The host doesn't wait between the calls, as it doesn't in training.
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        _action()
        event.record()
    torch.cuda.synchronize()
    # What is reserved, not what is allocated: the memory of a CUDA graph counts as free between its
    # replays, and nobody else can have it.
    reserved = float(torch.cuda.max_memory_reserved())
    torch.cuda.empty_cache()  # for the other process
    taken = [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]
    return taken, [reserved]


def resident_bytes(key: str) -> list[float]:
    """Of this process: VmRSS now, VmHWM the highest so far; empty anywhere but on Linux."""
    # Not getrusage: on Linux its peak is inherited from the process that started this one.
    status = Path("/proc/self/status")
    matches = re.findall(rf"{key}:\s+(\d+) kB", status.read_text()) if status.exists() else []
    return [1024.0 * int(kilobytes) for kilobytes in matches]


def machine() -> str:
    """What the figures depend on, in a line."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    name = models[0] if models else platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    load = os.getloadavg()[0]
    return (
        f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores (load {load:.1f} "
        f"before); torch {torch.__version__}; {gpu}"
    )
