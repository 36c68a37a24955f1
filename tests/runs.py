"""Small runs on the CPU: in this process, which saves the seconds that Python takes to start, or as
flags for a command."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import cli
from errors import UserError
from models import create_model, load_model, save_model
from train.grid import flags as to_words
from train.logger import Logger
from train.options import DistillingOptions

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@cache
def small_teacher() -> Path:
    """Weights that can teach."""
    path = Path(os.environ["TRANSKD_CACHE"]) / "teacher.safetensors"
    torch.manual_seed(1)
    save_model(create_model("segformer_b0"), path)
    return path


def flags_of(script: ModuleType, datadir: Path, folder: Path | None, /, **changes: Any) -> Any:
    """Flags of a run of batches of two, logged at every step, with a teacher where one is needed.

    Changes take the place of these; None leaves a flag out.
    """
    flags: dict[str, Any] = {"datadir": datadir, "output_dir": folder, "height": 64}
    flags |= {"num_workers": 0, "batch_size": 2, "steps_loss": 1}
    flags |= {"tensorboard": False, "device": "cpu"}
    if issubclass(script.Options, DistillingOptions):
        flags["teacher_weights"] = small_teacher()
    flags |= changes
    return to_words({name: value for name, value in flags.items() if value is not None})


def options_of(script: ModuleType, datadir: Path, folder: Path, /, **changes: Any) -> Any:
    """A script's options, parsed as by the command line."""
    return cli.parse(script.Options, flags_of(script, datadir, folder, **changes))


@contextmanager
def as_a_process() -> Iterator[None]:
    """What ends with a process: the lock of a run's folder, and what it does on signals."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the lock
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def call(monkeypatch: pytest.MonkeyPatch, command: Any, *arguments: object) -> int:
    """The exit code of a command that runs in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    try:
        with as_a_process():
            cli.run(command.main, command.Options)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@dataclass
class Small:
    """Trainings in this process, on one data set, in folders below one folder."""

    datadir: Path
    folder: Path

    @as_a_process()
    def train(self, script: ModuleType, name: str = "", **changes: Any) -> None:
        script.main(options_of(script, self.datadir, self.folder / name, **changes))

    def refused(self, says: str, script: ModuleType, name: str = "", **changes: Any) -> None:
        with pytest.raises(UserError, match=says):
            self.train(script, name, **changes)

    def records(self, event: str, name: str = "") -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, of one kind."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [record for line in lines if (record := json.loads(line))["event"] == event]

    def steps(self, name: str = "") -> list[int]:
        return [record["step"] for record in self.records("train", name)]

    def losses(self, name: str = "") -> list[dict[str, float]]:
        return [record["losses"] for record in self.records("train", name)]

    def require_equal(self, *names: str) -> None:
        """Two files hold the same network, bit for bit."""
        first, second = (load_model(self.folder / name).state_dict() for name in names)
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From now on a training is told to end after that step."""
    stepped = Logger.stepped

    def and_signal(self: Logger, done: int, *rest: Any) -> None:
        stepped(self, done, *rest)
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Logger, "stepped", and_signal)
