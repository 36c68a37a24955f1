"""Runs the jobs of a grid as processes of the public scripts, some at a time, and tells how far they are."""

import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live

from cli import MANY
from errors import UserError
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
    since: float
    """Unix time before the process was started."""
    started: float
    """When the process was started, then when its training began: imports and caches don't count as steps."""
    begin: dict[str, Any] = field(default_factory=dict)
    """The process's own "start" record, once it is there: an earlier process's may stand before it."""

    def look(self) -> None:
        """See whether the training has begun."""
        record = last_record(self.job.folder, "start") if self.training and not self.begin else {}
        if record.get("time", 0) >= self.since:
            self.begin, self.started = record, time.monotonic()

    def step(self) -> int | None:
        """The last step that was logged; None until the training begins."""
        return last_record(self.job.folder).get("step", self.begin["step"]) if self.begin else None

    def estimate(self) -> tuple[float, float] | None:
        """Seconds that are left to this training, and that one of all its steps takes, by its steps so far."""
        if (step := self.step()) is None or step <= self.begin["step"]:
            return None
        a_step = (time.monotonic() - self.started) / (step - self.begin["step"])
        return a_step * (self.begin["total_steps"] - step), a_step * self.begin["total_steps"]

    def __str__(self) -> str:
        if not self.training:
            return f"{self.job}: evaluating"
        if (step := self.step()) is None:
            return f"{self.job}: starting"
        miou = last_record(self.job.folder, "val").get("mean_iou")
        text = f"{self.job}: step {step}/{self.begin['total_steps']}"
        return text if miou is None else f"{text}, val mIoU {miou:.2%}"


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
        self,
        jobs: Sequence[Job],
        slots: Sequence[Mapping[str, str]],
        ended: Callable[[dict[Job, str]], object],
    ) -> None:
        self.places, self.free, self.on_end = len(slots), deque(slots), ended

        def due(job: Job) -> bool:
            # a student of a teacher that goes on is looked at again when that is done
            taught_anew = job.teacher is not None and due(job.teacher)
            return job.standing() != "finished" or taught_anew

        self.waiting = [job for job in jobs if due(job)]
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
                while (self.waiting or self.running) and interrupt.received is None:
                    self.start_ready()
                    for one in list(self.running):
                        one.look()
                        if one.process.poll() is not None:
                            self.over(one)
                    if time.monotonic() - shown > self.SHOW_SECONDS:
                        shown = time.monotonic()
                        show("\n".join([*map(str, self.running), self.summary()]))
                    time.sleep(self.LOOK_SECONDS)
            finally:  # also when something went wrong here
                for one in self.running:
                    one.process.send_signal(interrupt.received or signal.SIGTERM)
                for one in self.running:
                    one.process.wait()
        if interrupt.received is not None:
            CONSOLE.print("interrupted; the same command goes on from here")
            sys.exit(128 + interrupt.received)

    def start_ready(self) -> None:
        """Start what has a place and a teacher, once no training of an earlier, killed table holds a place any more."""
        if locked := [job for job in self.waiting if job.locked]:
            for job in locked:
                if job not in self.awaited:
                    CONSOLE.print(
                        f"{job}: still running, started by another process; waiting for it",
                        markup=False,
                    )
            self.awaited.update(locked)
            return
        for job in list(self.waiting):
            teacher = job.teacher
            if teacher in self.failed:
                self.fail(job, f"its teacher {teacher} failed")
            elif (
                self.free
                and teacher not in self.waiting
                and all(one.job is not teacher for one in self.running)
            ):
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
        since = time.time()
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            with job.log.open("ab") as log:
                log.write(f"$ python {shlex.join(command)}\n".encode())
                log.flush()
                process = subprocess.Popen(
                    [sys.executable, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | slot,
                    start_new_session=True,  # Ctrl-C reaches it through us, once; a second signal would not let it save
                )
        except OSError as error:
            self.free.append(slot)
            self.fail(job, f"it can't be started ({error})")
            return
        training = command is not job.evaluation
        started = time.monotonic()
        self.running.append(
            Running(
                job=job, slot=slot, process=process, training=training, since=since, started=started
            )
        )

    def over(self, one: Running) -> None:
        """Go on from training to evaluation, or call the job finished or failed."""
        self.running.remove(one)
        job, code = one.job, one.process.returncode
        if code == 0 and one.training:
            job.record(evaluated=False)
            if (estimate := one.estimate()) is not None:
                self.took.append(estimate[1])
            self.start(job, one.slot, job.evaluation)
            return
        self.free.append(one.slot)
        if code:
            said = [
                line
                for line in job.log.read_text(errors="replace").splitlines()[-20:]
                if line.strip()
            ]
            ended = f"exit code {code}" if code > 0 else signal.strsignal(-code)
            self.fail(job, f"{said[-1]} ({ended}, {short(job.log)})")
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
        text = f"{over} of {self.planned} runs done" + (
            f", {len(self.failed)} of them failed" if self.failed else ""
        )
        estimates = [(one, one.estimate()) for one in self.running if one.training]
        known = self.took + [estimate[1] for _, estimate in estimates if estimate]
        if known and over < self.planned:
            mean, now = statistics.mean(known), time.monotonic()
            left = sum(e[0] if e else max(0.0, mean - (now - one.started)) for one, e in estimates)
            left = (left + mean * len(self.waiting)) / min(
                self.places, len(self.running) + len(self.waiting)
            )
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
    if not 1 <= jobs < MANY:
        raise UserError(f"--jobs is {jobs}; it must be at least 1 and below {MANY}")
    if gpus:
        names = [name.strip() for name in gpus.split(",")]
        if not all(names) or len(set(names)) < len(names):
            raise UserError(f"--gpus is {gpus!r}; give different GPUs between commas: 0,1")
        if jobs != 1:
            raise UserError("--gpus runs one job on each GPU; leave --jobs out")
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{} for _ in range(jobs)]
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return [{"OMP_NUM_THREADS": str(max(1, cores // jobs))} for _ in range(jobs)]
