"""Times taken in turn, peaks of memory, and the machine in words."""

import gc
import os
import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from models.info import resident_memory

Run = Callable[[], object]
Pair = tuple[tuple[float, ...], tuple[float, ...]]  # every repetition of ours, and of theirs


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    height: int  # of the network's input; its width is twice that
    pixels: int  # height of photographs, label maps and colours; their width is twice that
    repeats: int  # of a training step; shorter things are repeated more often
    batch: int = 2


FULL = Sizes(height=512, pixels=1024, repeats=3)
QUICK = Sizes(height=64, pixels=128, repeats=1)


@dataclass(frozen=True)
class Row:
    """One comparison. A row without numbers says in `note` why."""

    name: str
    other: str  # whom ours is compared with
    what: Literal["time", "memory"] = "time"
    ours: tuple[float, ...] = ()  # seconds or bytes, every repetition
    theirs: tuple[float, ...] = ()
    target: float | None = None  # "time": theirs / ours at least; "memory": ours / theirs at most
    items: int = 1  # images, say, that one repetition handles; 0: not counted
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times faster ours is; or the share of the memory that ours takes."""
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


def in_turn(ours: Run, theirs: Run, repeats: int) -> Pair:
    """Seconds of each, `repeats` times ours, theirs, ours, theirs …, after one round that doesn't count."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(repeats + 1):
        for run, seconds in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return tuple(times[0][1:]), tuple(times[1][1:])


def apart(
    ours: Callable[[Sizes], Run], theirs: Callable[[Sizes], Run], sizes: Sizes, repeats: int
) -> tuple[Pair, Pair]:
    """As `in_turn`, with each side in a fresh process of its own, and what its memory took.

    Returns the seconds of both, and the bytes by which the resident memory of each rose from before it was built to
    its peak (empty where the system doesn't tell: anywhere but on Linux).
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.cases"])
    with (
        ProcessPoolExecutor(1, mp_context=context) as first,
        ProcessPoolExecutor(1, mp_context=context) as second,
    ):
        for side, build in ((first, ours), (second, theirs)):
            side.submit(_build, build, sizes, torch.get_num_threads()).result()
        times = in_turn(
            lambda: first.submit(_call).result(), lambda: second.submit(_call).result(), repeats
        )
        return times, (first.submit(_growth).result(), second.submit(_growth).result())


_run: Run  # in a process of `apart`
_before: int | None


def _build(build: Callable[[Sizes], Run], sizes: Sizes, threads: int) -> None:
    global _run, _before
    torch.set_num_threads(threads)
    build(QUICK)()  # loads the libraries' code, which is nobody's share
    gc.collect()
    _before = resident_memory("VmRSS")
    _run = build(sizes)


def _call() -> None:
    _run()


def _growth() -> tuple[float, ...]:
    peak = resident_memory("VmHWM")
    return () if _before is None or peak is None else (peak - _before,)


def machine() -> dict[str, Any]:
    """What the figures depend on, with the rates that bound them: matrix products and copying."""
    a, b = torch.rand(2, 1536, 1536)
    source, target = torch.rand(2, 2**24)
    products, copies = (
        median(seconds) for seconds in in_turn(lambda: a @ b, lambda: target.copy_(source), 7)
    )
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "gemm_gflops": round(2 * 1536**3 / products / 1e9),
        "copy_gb_per_second": round(2 * source.nbytes / copies / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
