"""Runs the jobs of a table: here, as many at a time as there are GPUs, or on a Slurm cluster."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from errors import UserError, require
from files import ROOT, acquire, read_json, write_json
from train.engine import remember_signals

Slot = dict[str, str]
"""Environment variables of a run: the GPU that it gets."""
Work = Generator[bool, None, None]
"""A job under way: yields True until it is over. Closed before, it lets a training save and end."""


@dataclass(kw_only=True, eq=False)
class Job:
    """One run of one row.

    Attributes:
        folder: where its checkpoints, log.txt, eval.json and done.json go.
        weights: what it is evaluated by, and teaches with.
        commands: to train and to evaluate, without `python`.
        teacher: the run that must have ended before.
        error: why it failed.
    """

    name: str
    folder: Path
    weights: Path
    commands: list[list[str]]
    teacher: "Job | None" = None
    error: str = ""

    @property
    def made_by(self) -> dict[str, Any]:
        """What decides its result: its commands, and its teacher's."""
        before = self.teacher.commands if self.teacher else []
        return {"commands": [*before, *self.commands]}

    @property
    def is_done(self) -> bool:
        """Whether it is evaluated, by these commands and not those before a grid was changed."""
        evaluated = (self.folder / "eval.json").is_file()
        return evaluated and read_json(self.folder / "done.json") == self.made_by

    @property
    def result(self) -> dict[str, Any] | None:
        """What the evaluation wrote, if it is done."""
        return read_json(self.folder / "eval.json") if self.is_done else None


def run_commands(job: Job, slot: Slot, lock: FileLock) -> Work:
    """Run a job's commands one after the other, with their output in log.txt.

    If one of them fails, the job's `error` says why. The lock is held until this is over.
    """
    path = job.folder / "log.txt"
    with ExitStack() as stack:
        stack.callback(lock.release)
        log = stack.enter_context(path.open("ab"))
        for command in job.commands:
            log.write(f"$ python {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | slot,
                start_new_session=True,  # Ctrl-C reaches it once, through us
            )
            try:
                while process.poll() is None:
                    yield True
            finally:  # also where it is closed: a training saves and ends
                process.terminate()
                process.wait()
            if process.returncode:
                # Its error, or the end of its traceback, says why.
                output = path.read_text(errors="replace").rpartition("$ python ")[2]
                lines = [line for line in output.splitlines() if line.strip()]
                errors = [line for line in lines if line.startswith("error: ")]
                job.error = f"{(errors or lines)[-1]} (exit code {process.returncode}, {path})"
                return
        write_json(job.made_by, job.folder / "done.json")


def start(job: Job, slot: Slot) -> Work | None:
    """Start a job, unless another table is at work on it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job.folder / "table.lock")
    if not acquire(lock):
        return None
    work = run_commands(job, slot, lock)
    next(work, None)  # it starts now
    return work


def run_here(jobs: Iterable[Job], slots: list[Slot], report: Callable[[], object]) -> None:
    """Run jobs, one in each slot at a time; `report` is called after each.

    A signal is passed on: every training saves, and the process ends.
    """
    waiting = list(jobs)
    running: dict[Job, tuple[Slot, Work]] = {}
    elsewhere: set[Job] = set()
    free = list(slots)
    signals = remember_signals()
    while waiting or running:
        # Start what has a free slot and a teacher that is done.
        for job in list(waiting):
            teacher = job.teacher
            if job.is_done:
                waiting.remove(job)
            elif teacher is not None and teacher.error:
                job.error = f"its teacher {teacher.name} failed"
                waiting.remove(job)
            elif free and (teacher is None or teacher.is_done):
                work = start(job, free[0])
                if work is not None:
                    running[job] = free.pop(0), work
                    waiting.remove(job)
                elif job not in elsewhere:
                    print(f"waiting for {job.name}, which another table runs", file=sys.stderr)
                    elsewhere.add(job)
        time.sleep(0.2)
        # Report what has ended, which frees its slot.
        for job, (slot, work) in list(running.items()):
            if next(work, False):
                continue
            del running[job]
            free.append(slot)
            score = (job.result or {}).get("mean_iou") or 0.0
            what = f" failed: {job.error}" if job.error else f": mIoU {score:.2%}"
            left = len(waiting) + len(running)
            print(f"{job.name}{what}, {left} runs left", file=sys.stderr, flush=True)
            report()
        if signals:
            for _, work in running.values():
                work.close()
            print("interrupted; the same command continues", file=sys.stderr)
            sys.exit(128 + signals[0])


class ClusterJob:
    """A job as submitit calls it on the cluster, and once more after it was requeued."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.running: Work | None = None

    def __call__(self) -> None:
        while self.running is None:  # another table may be at work on it
            self.running = start(self.job, {})
            time.sleep(1)
        for _ in self.running:
            time.sleep(1)
        if self.job.error:
            raise RuntimeError(self.job.error)

    def checkpoint(self) -> Any:
        """Called by submitit when the job is about to be stopped: the training saves and ends."""
        import submitit

        if self.running is not None:
            with suppress(ValueError):  # it is at work at this moment, and ends with this process
                self.running.close()
        return submitit.helpers.DelayedSubmission(ClusterJob(self.job))


def submit(jobs: Iterable[Job], folder: Path, options: str) -> None:
    """Submit jobs to Slurm with options of sbatch, such as 'partition=gpu,time=12:00:00'.

    Without others, a job gets a GPU for 24 hours, after which it is put into the queue again. A
    student's job waits for its teacher's. Raises UserError if submitit or Slurm is missing.
    """
    require("submitit", "-r requirements/cluster.txt")
    import submitit

    try:
        # It would count how often a job was near its limit, and give up.
        executor = submitit.SlurmExecutor(folder=folder / "slurm", max_num_timeout=1000)
    except RuntimeError as error:
        raise UserError(f"Slurm is not here ({error})") from error
    given: dict[str, Any] = {"gpus-per-node": 1, "time": "24:00:00"}
    for option in filter(None, options.split(",")):
        name, _, value = option.partition("=")
        given[name] = value or True  # such as "exclusive"
    ids: dict[str, str] = {}
    for job in jobs:
        after = ids.get(job.teacher.name) if job.teacher else None
        executor.update_parameters(
            job_name=job.name,
            signal_delay_s=120,  # time to save before the limit
            additional_parameters=given | ({"dependency": f"afterok:{after}"} if after else {}),
        )
        ids[job.name] = executor.submit(ClusterJob(job)).job_id
        print(f"{job.name}: job {ids[job.name]}")
