"""What every command shares: a user's mistake ends in exit code 2, and what is written is whole."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NoReturn

import pytest
import torch

import cli
from errors import UserError
from files import ROOT, atomic_write
from models.distillation.methods import METHODS
from tests import runs
from train import distill


@dataclass
class Options:
    """Nothing."""

    kind: Literal["one", "two"] = "one"
    """What."""
    height: int = 512
    """How high."""


def run(monkeypatch: pytest.MonkeyPatch, main: Callable[[Options], Any], *arguments: str) -> int:
    return runs.call(monkeypatch, SimpleNamespace(main=main, Options=Options), *arguments)


def fail(error: BaseException) -> Callable[[Options], NoReturn]:
    def main(options: Options) -> NoReturn:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("no\nsuch thing"), 2, "error: [rank 3] no such thing"),
        (FileNotFoundError(2, "No such file", "gone.png"), 2, "error: [rank 3] can't use gone.png"),
        (MemoryError(), 2, "error: [rank 3] out of memory; lower --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "error: [rank 3] out of memory"),
        (RuntimeError("CPU: can't allocate memory"), 2, "error: [rank 3] out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("RANK", "3")  # torchrun's
    assert run(monkeypatch, fail(error)) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(says)


@pytest.mark.parametrize("error", [OSError("no path"), KeyError("ours"), RuntimeError("ours")])
def test_bugs_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)):
        run(monkeypatch, fail(error))


def test_tyros_box_in_a_terminal() -> None:
    """At 80 columns it is a whole box."""
    code, shown = runs.in_terminal(80, "train/student.py", "--hieght", "3", "--datadir", "x")
    lines = shown.splitlines()
    assert code == 2 and "--hieght" in shown and "--height" in shown
    assert {len(line) for line in lines} == {80}, shown
    assert [lines[0][0], lines[0][-1], lines[-1][0], lines[-1][-1]] == list("╭╮╰╯")
    assert all(line[0] in "│├" and line[-1] in "│┤" for line in lines[1:-1])


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


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """How a command is called; methods stand on lines of their own."""
    assert runs.call(monkeypatch, distill, "--help") == 0
    lines = [line.removeprefix("- ") for line in capsys.readouterr().out.splitlines()]
    listed = [line for line in lines if line.startswith(tuple(METHODS))]
    assert len(listed) >= 10 and all(len(line) < 80 for line in listed)
    spec = SimpleNamespace(name="models.zoo.__main__")
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    assert run(monkeypatch, fail(AssertionError()), "--help") == 0
    assert capsys.readouterr().out.startswith("usage: python -m models.zoo [")


def test_names_that_no_terminal_can_show(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """A file's name is bytes; those of an old archive may be no UTF-8."""
    with os.fdopen(os.dup(1), "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        run(monkeypatch, lambda _: print(os.fsdecode(b"caf\xe9"), "✓"))
    assert capfdbinary.readouterr().out == b"caf\\udce9 \\u2713\n"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that computes nothing is refused; the GPU that is named is made the current one.

    Plain "cuda" has no number, which torch.cuda.set_device would want.
    """
    assert "OMP_WAIT_POLICY" in os.environ
    with pytest.raises(UserError, match="--device meta does not work here"):
        cli.find_device("meta")
    zeros, chosen = torch.zeros, list[torch.device]()
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [str(cli.find_device(name)) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    assert chosen == [torch.device("cuda:1")]


def test_writing_goes_through_a_link_and_replaces_no_device(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "far" / "target.json"
    link.symlink_to(target)
    with atomic_write(link) as aside:
        aside.write_text("new")
    with pytest.raises(KeyError), atomic_write(link) as aside:
        aside.write_text("half")
        raise KeyError
    assert link.is_symlink() and target.read_text() == "new"
    longest = tmp_path / f"{'a' * 251}.png"
    with atomic_write(longest) as aside:
        aside.write_text("new")
    assert aside.suffix == ".png" and longest.read_text() == "new"
    longest.unlink()
    os.mkfifo(tmp_path / "pipe")
    for place, says in (
        (tmp_path / "pipe", "a folder or a device; name a file"),
        (tmp_path, "a folder or a device; name a file"),
        (tmp_path / ("a" * 300), "too long"),
    ):
        with pytest.raises(UserError, match=says), atomic_write(place) as aside:
            aside.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "link.json", "pipe"]
