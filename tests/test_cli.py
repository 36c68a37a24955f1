"""What every command shares: a user's mistake ends in one line, and a file that is written costs no other."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import pytest
import torch

import cli
from datasets.samples import files_below
from errors import UserError
from eval.options import claim_file
from files import atomic_write


@dataclass
class Options:
    """Nothing."""

    kind: Literal["one", "two"] = "one"
    """What."""
    height: int = 512
    """How high."""


def fail(error: Exception) -> Callable[[Options], NoReturn]:
    def main(options: Options) -> NoReturn:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("no\nsuch thing"), "no such thing"),
        (
            FileNotFoundError(2, "No such file", "gone.png"),
            "can't use gone.png (No such file); check the path",
        ),
        (
            OverflowError("int too large"),
            "a number is too large (int too large); give a smaller one",
        ),
        (MemoryError(), "out of memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_cause_is_one_line(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as end:
        cli.run(fail(error), Options)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"error: {says}")


@dataclass
class Required:
    """Something."""

    name: Literal[
        "one",
        "seventy_seven_million",
        "eight_hundred_thousand",
        "ninety_nine_billion",
        "ten_thousand_and_one",
    ]
    """What; not to be confused with --kind."""
    to: Path
    """Where."""
    kind: int = 1
    """Which."""


@pytest.mark.parametrize(
    ("given", "lacking"),
    [((), "--name, --to"), (("--to", "x"), "--name"), (("--name", "one", "--kind", 2), "--to")],
)
def test_what_must_be_given_is_named_alone(given: tuple[object, ...], lacking: str) -> None:
    with pytest.raises(UserError, match=rf"^{lacking} must be given \(--help shows all flags\)$"):
        cli.parse(Required, [str(word) for word in given])


@pytest.mark.parametrize("error", [OSError("no path"), KeyError("ours"), RuntimeError("ours")])
def test_our_own_mistakes_keep_their_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(type(error)):
        cli.run(fail(error), Options)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--kind", "three"],
            r"^invalid choice 'three' for argument '--kind'.*'two'\) ?\. \(--help",
        ),
        (
            ["--height", "x"],
            r"^value error: Error parsing --height.*'x'; Argument helptext: --height INT How high",
        ),
        (["--hieght", "3"], r"^unrecognized options: --hieght, 3; Perhaps you meant: --height INT"),
        (["--height"], r"^missing argument: Missing value"),
    ],
)
def test_a_wrong_flag_is_said_once(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        cli.parse(Options, arguments)
    assert "\n" not in str(error.value) and "─" not in str(error.value)


def test_names_that_no_terminal_can_show(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture
) -> None:
    """A file's name is bytes; those of an old archive may be no UTF-8."""
    monkeypatch.setattr(sys, "argv", ["command"])
    with os.fdopen(os.dup(1), "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        cli.run(lambda options: print(os.fsdecode(b"caf\xe9"), "✓"), Options)
    assert capfdbinary.readouterr().out == b"caf\\udce9 \\u2713\n"


def test_a_device_that_computes_nothing_is_none() -> None:
    with pytest.raises(UserError, match="--device meta does not work here"):
        cli.find_device("meta")


def test_the_gpu_that_is_named_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain "cuda" has no number, which torch.cuda.set_device would want."""
    zeros, chosen = torch.zeros, []
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
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, Path("/")):
        with (
            pytest.raises(UserError, match="a folder or a device; name a file"),
            atomic_write(place),
        ):
            pytest.fail("nothing can be written there")
    with pytest.raises(UserError, match="too long"), atomic_write(tmp_path / ("a" * 300)) as aside:
        aside.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "link.json", "pipe"]


def test_a_result_takes_the_place_of_a_result_alone(tmp_path: Path) -> None:
    """`--json` and the weights that were meant for `--weights` are soon mixed up."""
    weights, before, empty = (tmp_path / name for name in ("last.pt", "eval.json", "new"))
    weights.write_text("x")
    before.write_text("x")
    empty.touch()
    with pytest.raises(
        UserError, match=r"last\.pt is there already and does not end in \.json; name another"
    ):
        claim_file(weights)
    with pytest.raises(UserError, match=r"eval\.json is there already and does not end in \.html"):
        claim_file(before, ".html")
    for path in (before, empty, tmp_path / "none", tmp_path / "new folder" / "r.json"):
        claim_file(path)


def test_a_folder_that_must_not_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "city").mkdir()
    (tmp_path / "a.png").touch()
    assert [path.name for path in files_below(tmp_path)] == ["a.png"] and not list(
        files_below(tmp_path / "none")
    )
    scandir = os.scandir

    def refused(folder: Path) -> object:  # the tests may be root's, who may read all
        if Path(folder).name == "city":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError):
        list(files_below(tmp_path))
