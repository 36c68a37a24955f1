"""Runs the jobs of a grid as processes of the public scripts, some at a time, and tells how far they are."""

import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live

from cli import UserError
from train.engine import Interrupt
from train.grid import Job, last_record, short

CONSOLE = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(kw_only=True, eq=False)
class Running:
    """A job's process."""

    job: Job
    slot: Mapping[str, str]
    process: subprocess.Popen[bytes]
    training: bool
    started: float
    first_step: int
    log_start: int
    total: int | None = None
    """Steps of the whole run, once the training has said so."""

    def step(self) -> int | None:
        """The last step that was logged; None before the first."""
        if self.total is None:
            with self.job.log.open("rb") as log:
                log.seek(self.log_start)
                told = re.search(rb", (\d+) in all, on ", log.read(2**16))
            self.total = int(told[1]) if told else None
        return last_record(self.job.folder).get("step") if self.total is not None else None

    def estimate(self) -> float | None:
        """Seconds that this process will take in all, by its steps so far."""
        done = (self.step() or 0) - self.first_step
        if not self.training or self.total is None or done <= 0:
            return None
        return (time.monotonic() - self.started) * (self.total - self.first_step) / done

    def __str__(self) -> str:
        if not self.training:
            return f"{self.job}: evaluating"
        if (step := self.step()) is None:
            return f"{self.job}: starting"
        miou = last_record(self.job.folder, "val").get("mean_iou")
        return f"{self.job}: step {step}/{self.total}" + ("" if miou is None else f", val mIoU {miou:.2%}")


class Runner:
    """Runs jobs, as many at a time as there are slots, until all are finished or failed.

    Args:
        slots: the environment variables of each.
        ended: called with `failed` after every job that finishes or fails.

    Attributes:
        failed: why, by job.
    """

    LOOK_SECONDS = 0.1
    SHOW_SECONDS = 1.0 if CONSOLE.is_terminal else 60.0

    def __init__(
        self, jobs: Sequence[Job], slots: Sequence[Mapping[str, str]], ended: Callable[[dict[Job, str]], object]
    ) -> None:
        self.places, self.free, self.on_end = len(slots), deque(slots), ended
        self.waiting: list[Job] = []
        for job in sorted(jobs, key=lambda job: job.teacher is not None):
            # a student of a teacher that goes on is looked at again when that is done
            if job.standing() != "finished" or job.teacher in self.waiting:
                self.waiting.append(job)
        self.waiting.sort(key=jobs.index)
        self.planned = len(self.waiting)
        self.running: list[Running] = []
        self.failed: dict[Job, str] = {}
        self.awaited: set[Job] = set()
        self.took: list[float] = []

    def run(self) -> None:
        """Run everything.

        Raises:
            SystemExit: SIGINT or SIGTERM came; it was passed on, and every training has saved.
        """
        shown = time.monotonic()
        with Interrupt() as interrupt, display() as show:
            try:
                while (self.waiting or self.running) and interrupt.signal is None:
                    self.start_ready()
                    for one in list(self.running):
                        if one.process.poll() is not None:
                            self.over(one)
                    if time.monotonic() - shown > self.SHOW_SECONDS:
                        shown = time.monotonic()
                        show("\n".join([*map(str, self.running), self.summary()]))
                    time.sleep(self.LOOK_SECONDS)
            finally:  # also when something went wrong here
                for one in self.running:
                    one.process.send_signal(interrupt.signal or signal.SIGTERM)
                for one in self.running:
                    one.process.wait()
        if interrupt.signal is not None:
            CONSOLE.print("interrupted; the same command goes on from here")
            sys.exit(128 + interrupt.signal)

    def start_ready(self) -> None:
        """Start what has a place and a teacher, once no training of an earlier, killed table holds a place any more."""
        if locked := [job for job in self.waiting if job.locked]:
            for job in locked:
                if job not in self.awaited:
                    CONSOLE.print(f"{job}: still running, started by another process; waiting for it", markup=False)
            self.awaited.update(locked)
            return
        for job in list(self.waiting):
            teacher = job.teacher
            if teacher in self.failed:
                self.fail(job, f"its teacher {teacher} failed")
            elif self.free and teacher not in self.waiting and all(one.job is not teacher for one in self.running):
                try:
                    standing = job.standing()
                except UserError as error:  # the teacher has become another one
                    self.fail(job, str(error))
                    continue
                self.waiting.remove(job)
                if standing == "finished":
                    self.on_end(self.failed)
                else:
                    self.start(job, self.free.popleft(), job.commands(standing)[0])

    def start(self, job: Job, slot: Mapping[str, str], command: list[str]) -> None:
        """Start one of a job's commands; what it says goes into the job's log."""
        job.folder.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            log.write(f"$ python {shlex.join(command)}\n".encode())
            log.flush()
            one = Running(
                job=job,
                slot=slot,
                process=subprocess.Popen(
                    [sys.executable, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | slot,
                    start_new_session=True,  # Ctrl-C reaches it through us, once; a second signal would not let it save
                ),
                training=command is not job.evaluation,
                started=time.monotonic(),
                first_step=last_record(job.folder).get("step", 0) if job.begun else 0,
                log_start=log.tell(),
            )
        self.running.append(one)

    def over(self, one: Running) -> None:
        """Go on from training to evaluation, or call the job finished or failed."""
        self.running.remove(one)
        job, code = one.job, one.process.returncode
        if code == 0 and one.training:
            job.record(evaluated=False)
            self.took.append(time.monotonic() - one.started)
            self.start(job, one.slot, job.evaluation)
            return
        self.free.append(one.slot)
        if code:
            said = [line for line in job.log.read_text(errors="replace").splitlines()[-20:] if line.strip()]
            self.fail(job, f"{said[-1]} (exit code {code}, {short(job.log)})")
            return
        if (result := job.result()) is None:
            self.fail(job, f"its evaluation wrote no mean IoU ({short(job.log)})")
            return
        job.record(evaluated=True)
        CONSOLE.print(f"{job}: mIoU {result['mean_iou']:.2%}; {self.summary()}", markup=False)
        self.on_end(self.failed)

    def fail(self, job: Job, reason: str) -> None:
        if job in self.waiting:
            self.waiting.remove(job)
        self.failed[job] = reason
        CONSOLE.print(f"{job} failed: {reason}", markup=False)
        self.on_end(self.failed)

    def summary(self) -> str:
        """How many are done, and roughly how long the rest takes."""
        over = self.planned - len(self.waiting) - len(self.running)
        text = f"{over} of {self.planned} runs done" + (f", {len(self.failed)} of them failed" if self.failed else "")
        estimates = [(one, one.estimate()) for one in self.running]
        known = self.took + [seconds for _, seconds in estimates if seconds is not None]
        if known and over < self.planned:
            mean, now = statistics.mean(known), time.monotonic()
            left = sum(max(0.0, (seconds or mean) - (now - one.started)) for one, seconds in estimates if one.training)
            left = (left + mean * len(self.waiting)) / min(self.places, len(estimates) + len(self.waiting))
            hours, minutes = divmod(math.ceil(left / 60), 60)
            text += ", about " + (f"{hours} h " if hours else "") + f"{minutes} min left"
        return text


@contextmanager
def display() -> Iterator[Callable[[str], None]]:
    """Lines that stay in place on a terminal, plain ones elsewhere."""
    if not CONSOLE.is_terminal:
        yield lambda text: CONSOLE.print(text, markup=False)
        return
    with Live(console=CONSOLE, auto_refresh=False, transient=True) as live:
        yield lambda text: live.update(text, refresh=True)


def slots(gpus: str, jobs: int) -> list[dict[str, str]]:
    """The environment of each of the jobs that run at a time: a GPU each, or a share of the cores.

    Raises:
        UserError: `--gpus` or `--jobs` makes no sense.
    """
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}; it must be at least 1")
    if gpus:
        names = [name.strip() for name in gpus.split(",")]
        if not all(names) or len(set(names)) < len(names):
            raise UserError(f"--gpus is {gpus!r}; give different GPUs between commas: 0,1")
        if jobs != 1:
            raise UserError("--gpus runs one job on each GPU; leave --jobs out")
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{} for _ in range(jobs)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{"OMP_NUM_THREADS": str(max(1, cores // jobs))} for _ in range(jobs)]
