"""What every command shares: a user's mistake ends in exit code 2, and what is written is whole."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from errors import UserError
from files import ROOT, atomic_write
from models import info
from progress import progress_line
from tests import runs


def run(monkeypatch: pytest.MonkeyPatch, does: Any) -> int:
    """The exit code of a command that raises an error, or does something."""
    monkeypatch.setattr(info, "main", Mock(side_effect=does))
    return runs.call(monkeypatch, info)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("no\nsuch thing"), 2, "error: [rank 3] no such thing"),
        (FileNotFoundError(2, "No such file", "gone.png"), 2, "error: [rank 3] can't use gone.png"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "error: [rank 3] out of memory"),
        (RuntimeError("CPU: can't allocate memory"), 2, "error: [rank 3] out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_can_cause_is_one_line(error, code, says, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "3")  # torchrun's
    assert run(monkeypatch, error) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(says)


def test_a_mistake_stands_behind_a_progress_line(monkeypatch, capsys) -> None:
    _line = progress_line("training", 5)
    assert run(monkeypatch, UserError("no such thing")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no such thing"


@pytest.mark.parametrize("error", [OSError("no path"), RuntimeError("ours")])
def test_bugs_keep_their_traceback(error, monkeypatch) -> None:
    with pytest.raises(type(error)):
        run(monkeypatch, error)


def test_a_reader_that_leaves_and_a_full_disk() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "models.zoo", "--help"]
    common: dict[str, Any] = {"cwd": ROOT, "stderr": subprocess.PIPE}
    done = subprocess.run(command, stdout=writing, **common)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command, stdout=full, **common)
        assert done.returncode == 2 and done.stderr.startswith(b"error: can't write the output (no")


def test_names_that_no_terminal_can_show(monkeypatch, capfdbinary) -> None:
    with os.fdopen(os.dup(1), "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        run(monkeypatch, lambda _: print(os.fsdecode(b"caf\xe9"), "✓"))
    assert capfdbinary.readouterr().out == b"caf\\udce9 \\u2713\n"


def test_writing_goes_through_a_link_and_replaces_no_device(tmp_path) -> None:
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "far" / "target.json"
    link.symlink_to(target)
    with atomic_write(link) as aside:
        aside.write_text("new")
    with pytest.raises(KeyError), atomic_write(link) as aside:
        aside.write_text("half")
        raise KeyError
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="a folder or a device"), atomic_write(tmp_path / "pipe"):
        pass
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["far", "far/target.json", "link.json", "pipe"]
