"""Two processes compute what one computes with the same global batch."""

import socket
from pathlib import Path

import pytest

from datasets import open_split
from eval.inference import evaluate
from models import load_model
from tests.conftest import Command
from tests.test_training import SMALL, assert_equal, records


def torchrun(command: Command, *arguments: object):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-addr", "127.0.0.1")
    return command(*launcher, "--master-port", port, *arguments)


@pytest.mark.slow
def test_two_processes(command: Command, scenes: Path, teacher_weights: Path, tmp_path: Path) -> None:
    """Without dropout, whose draws each process makes for itself; BatchNorm sees two images at a time in both."""
    names = sorted(p.name for p in (scenes / "leftImg8bit" / "train").rglob("*.png"))
    listed = tmp_path / "eight.txt"  # so that every batch of four is whole
    listed.write_text("\n".join(names[:8]))
    flags = ["train/TransKDBase.py", "--datadir", scenes, "--teacher-weights", teacher_weights, *SMALL]
    flags += ["--train-list", listed, "--batch-size", 4, "--max-steps", 5, "--validate-every", 5]
    flags += ["--drop-path-rate", 0, "--dropout", 0, "--lr", 1e-4]
    one = command(*flags, "--accumulate", 2, "--output-dir", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    two = torchrun(command, *flags, "--output-dir", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    first, second = ([r for r in records(tmp_path / n) if r["event"] == "train"] for n in ("one", "two"))
    assert len(first) == len(second) == 5
    for a, b in zip(first, second, strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-5 if a["step"] == 1 else 1e-3)
    for name in ("one", "two"):  # what is logged is what the saved network scores
        student = load_model(tmp_path / name / "student.safetensors")
        found = evaluate(student, open_split("cityscapes", scenes, "val", height=64, cache=False), progress=False)
        logged = next(r for r in records(tmp_path / name) if r["event"] == "val")
        assert found.as_json()["mean_iou"] == pytest.approx(logged["mean_iou"], abs=1e-6)
    counted = [next(r for r in records(tmp_path / n) if r["event"] == "val")["images"] for n in ("one", "two")]
    assert counted == [4, 4]


@pytest.mark.slow
def test_two_processes_resume_exactly(command: Command, scenes: Path, tmp_path: Path) -> None:
    flags = ("train/student.py", "--datadir", scenes, *SMALL, "--batch-size", 4, "--validate-every", 2)
    for steps, name, more in ((6, "whole", ()), (4, "parts", ()), (6, "parts", ("--resume",))):
        done = torchrun(command, *flags, "--max-steps", steps, "--output-dir", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    assert_equal(tmp_path / "whole" / "student.safetensors", tmp_path / "parts" / "student.safetensors")


def test_batch_that_cannot_be_shared(command: Command, scenes: Path, tmp_path: Path) -> None:
    done = command("train/student.py", "--datadir", scenes, *SMALL, "--accumulate", 3, "--output-dir", tmp_path / "run")
    assert done.returncode == 2 and "multiple of 3" in done.stderr
