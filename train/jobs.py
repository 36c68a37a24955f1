"""Runs the jobs of a table: here, as many at a time as there are GPUs, or on a Slurm cluster."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from errors import UserError, require
from files import ROOT, acquire, make_folder, read_json, write_json
from train.engine import remember_signals

Slot = dict[str, str]
"""Environment variables of a run: the GPU that it gets."""


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
    def is_done(self) -> bool:
        """Whether these commands have ended well, and not others of a grid that was changed."""
        return read_json(self.folder / "done.json") == {"commands": self.commands}

    @property
    def result(self) -> dict[str, Any] | None:
        """What the evaluation wrote, if it is done."""
        return read_json(self.folder / "eval.json") if self.is_done else None


class Running:
    """A job under way: its commands run one after the other, with their output in log.txt."""

    def __init__(self, job: Job, slot: Slot, lock: FileLock) -> None:
        self.job = job
        self.slot = slot
        self.lock = lock
        self.log: IO[bytes] = (job.folder / "log.txt").open("ab")
        self.left = list(job.commands)
        self.start_next()

    def start_next(self) -> None:
        command = self.left.pop(0)
        self.log.write(f"$ python {shlex.join(command)}\n".encode())
        self.log.flush()
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=os.environ | self.slot,
            start_new_session=True,  # Ctrl-C reaches it once, through us
        )

    def advance(self) -> bool:
        """Start the next command when one has ended. Returns whether the job is over.

        If it failed, its `error` says why.
        """
        code = self.process.poll()
        if code is None:
            return False
        if code == 0 and self.left:
            self.start_next()
            return False
        if code:
            # The last line of its output says why.
            lines = Path(self.log.name).read_text(errors="replace").splitlines()
            last = next((line for line in reversed(lines) if line.strip()), "")
            self.job.error = f"{last} (exit code {code}, {self.log.name})"
        else:
            write_json({"commands": self.job.commands}, self.job.folder / "done.json")
        self.close()
        return True

    def stop(self) -> None:
        """Let a training save and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()
        self.close()

    def close(self) -> None:
        self.log.close()
        self.lock.release()


def start(job: Job, slot: Slot) -> Running | None:
    """Start a job, unless another table is at work on it. Raises UserError without a folder."""
    make_folder(job.folder)
    lock = FileLock(job.folder / "table.lock")
    return Running(job, slot, lock) if acquire(lock) else None


def run_here(jobs: Iterable[Job], slots: list[Slot], report: Callable[[], object]) -> None:
    """Run jobs, one in each slot at a time; `report` is called after each.

    A signal is passed on: every training saves, and the process ends.
    """
    waiting = list(jobs)
    running: list[Running] = []
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
                started = start(job, free[0])
                if started is None:  # ask again later
                    if job not in elsewhere:
                        print(f"waiting for {job.name}, which another table runs", file=sys.stderr)
                    elsewhere.add(job)
                else:
                    running.append(started)
                    waiting.remove(job)
                    free.pop(0)
        time.sleep(0.2)
        # Report what has ended, which frees its slot.
        for run in list(running):
            if not run.advance():
                continue
            running.remove(run)
            free.append(run.slot)
            score = (run.job.result or {}).get("mean_iou") or 0.0
            what = f" failed: {run.job.error}" if run.job.error else f": mIoU {score:.2%}"
            left = len(waiting) + len(running)
            print(f"{run.job.name}{what}, {left} runs left", file=sys.stderr, flush=True)
            report()
        if signals:
            for run in running:
                run.stop()
            print("interrupted; the same command continues", file=sys.stderr)
            sys.exit(128 + signals[0])


class ClusterJob:
    """A job as submitit calls it on the cluster, and once more after it was requeued."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.running: Running | None = None

    def __call__(self) -> None:
        while self.running is None:  # another table may be at work on it
            self.running = start(self.job, {})
            time.sleep(1)
        while not self.running.advance():
            time.sleep(1)
        if self.job.error:
            raise RuntimeError(self.job.error)

    def checkpoint(self) -> Any:
        """Called by submitit when the job is about to be stopped: the training saves and ends."""
        import submitit

        if self.running is not None:
            self.running.stop()
        return submitit.helpers.DelayedSubmission(ClusterJob(self.job))


def submit(jobs: Iterable[Job], folder: Path, options: str) -> None:
    """Submit jobs to Slurm with options of sbatch, such as 'partition=gpu,time=24:00:00'.

    A student's job waits for its teacher's. Raises UserError if submitit or Slurm is missing.
    """
    require("submitit", "-r requirements/cluster.txt")
    import submitit

    given = {"gpus-per-node": 1} | dict(pair.split("=", 1) for pair in options.split(",") if pair)
    time_limit = {"time": given.pop("time")} if "time" in given else {}
    ids: dict[str, str] = {}
    for job in jobs:
        try:
            executor = submitit.SlurmExecutor(folder=folder / "slurm")
        except RuntimeError as error:
            raise UserError(f"Slurm is not here ({error})") from error
        after = ids.get(job.teacher.name) if job.teacher else None
        more = given | ({"dependency": f"afterok:{after}"} if after else {})
        executor.update_parameters(
            job_name=job.name,
            signal_delay_s=120,  # time to save before the limit
            additional_parameters=more,
            **time_limit,
        )
        ids[job.name] = executor.submit(ClusterJob(job)).job_id
        print(f"{job.name}: job {ids[job.name]}")
