"""Nothing is lost and nothing is silent: kills, signals, full disks, damaged files, NaN, two runs
in one folder."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock

from tests import runs
from tests.runs import Small
from tests.trees import limited
from train import engine, student
from train.checkpoint import load_checkpoint


def train_with_a_cache_in(folder: Path, options: Any) -> None:
    torch.set_num_threads(1)  # as in conftest.py
    os.environ["TRANSKD_CACHE"] = str(folder)
    student.main(options)


@pytest.mark.slow
def test_twenty_kills_change_nothing(small: Small) -> None:
    """Killed at random, with a worker, saving after every step: the bits of a run left alone.

    Two in three are killed after a checkpoint, the others while they start.
    """
    more: dict[str, Any] = {"max_steps": 7, "save_every": 0, "num_workers": 1}
    small.train(student, "whole", **more)
    folder = small.folder / "killed"
    last = folder / "last.pt"
    options = runs.options_of(student, small.datadir, folder, resume="auto", **more)
    cache = small.folder / "cache"  # built anew, under fire
    context = multiprocessing.get_context("forkserver")  # which pays for the imports once
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    moments, kills = random.Random(7), 0

    def saved() -> int:
        return last.stat().st_mtime_ns if last.exists() else 0

    while kills < 20:
        before = saved()
        process = context.Process(target=train_with_a_cache_in, args=(cache, options))
        process.start()
        while kills % 3 and process.is_alive() and saved() == before:
            time.sleep(0.01)
        process.join(moments.uniform(0, 0.4))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        else:  # it got through: once more
            assert process.exitcode == 0
            shutil.rmtree(folder)
    small.train(student, "killed", resume="auto", **more)
    assert not [*folder.glob(".*")]  # of saves that were killed
    for name in ("student.safetensors", "student_best.safetensors"):
        assert (small.folder / "whole" / name).read_bytes() == (folder / name).read_bytes()
    assert small.losses("whole") == small.losses("killed") and len(small.losses("killed")) == 7


def test_signals_that_save() -> None:
    """Ctrl-C, a terminal that closes, and what schedulers of clusters send; a second one acts."""
    with runs.as_a_process():
        received = engine.remember_signals()
        for number in runs.SIGNALS:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_DFL
        assert received == runs.SIGNALS


def test_what_is_no_number(small: Small) -> None:
    more = {"num_epochs": 2, "steps_loss": 3, "lr": 1e20}
    says = r"the loss ce is NaN or infinite at step 2 \(images leftImg8bit/train/.*--lr"
    small.refused(says, student, "losses", **more)
    # An epoch's last step: its weights are finite, and no loss shows what they give.
    small.refused("outputs are NaN or infinite", student, "outputs", batch_size=10, **more)
    assert not [*small.folder.rglob("*.safetensors"), *small.folder.rglob("*.pt")]
    # Weights that overflow behind a finite loss, in the step before a save.
    small.train(student, max_steps=2)
    says = r"step 3 made weights NaN.*the last good state is kept"
    more = {"lr": 1e39, "max_steps": 5, "save_every": 0, "resume": True, "override": True}
    small.refused(says, student, **more)
    assert load_checkpoint(small.folder)["state"]["step"] == 2


def test_full_disk(small: Small) -> None:
    """A limit on file sizes stands in for it: the write fails half-way."""
    small.train(student, max_steps=2)
    before = (small.folder / "last.pt").read_bytes()
    with limited(resource.RLIMIT_FSIZE, len(before) // 2):
        says = r"can't write .*\.pt \(File too large\); nothing"
        small.refused(says, student, max_steps=4, resume=True)
    assert (small.folder / "last.pt").read_bytes() == before
    small.train(student, max_steps=4, resume=True)
    assert not [path for path in small.folder.iterdir() if path.name.startswith(".")]


def test_a_damaged_checkpoint(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    """The one before it is taken, with a warning, and the result is the same."""
    small.train(student, "whole", max_steps=6)
    small.train(student, "damaged", max_steps=4, save_every=0)
    last = small.folder / "damaged" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    small.train(student, "damaged", max_steps=6, resume=True)
    assert "last.pt is damaged" in caplog.text and "previous.pt, step 3" in caplog.text
    small.require_equal("whole/student.safetensors", "damaged/student.safetensors")
    assert small.steps("damaged") == [1, 2, 3, 4, 5, 6]  # the fourth once
    last.write_bytes(b"")
    torch.save({"a": torch.zeros(1)}, last.with_name("previous.pt"))  # another program's
    says = r"no whole checkpoint in .* \(it is another program's\); train in another folder"
    small.refused(says, student, "damaged", resume=True)


def test_folders_that_cannot_be_used(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileLock(small.folder / "lock"):
        small.refused("another run writes into", student)
    (small.folder / "file").touch()
    small.refused(r"can't write to .*file/run \(Not a directory\)", student, "file/run")
    monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=PermissionError))  # another user's
    small.refused("can't write to .*; choose another --output-dir", student)
