"""Nothing is lost and nothing is silent: kills, full disks, damaged files, NaN, two runs in one folder."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import demo
from datasets.synthetic import write_dataset
from errors import UserError
from models.distillation import Distiller
from tests.conftest import ROOT, Command
from tests.test_training import SMALL, assert_equal, options_of, records
from train import engine
from train.run_folder import load_checkpoint

RUN = ("train/student.py", *SMALL, "--max-steps", 12, "--validate-every", 2)

# A driver that pays for the imports once: each attempt is a fork that is killed, until one comes to its end.
KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, {root!r})
import cli
from train import student
arguments, kills = sys.argv[1:-1], int(sys.argv[-1])
moments, killed = random.Random(7), 0
for attempt in range(10 * kills):
    child = os.fork()
    if child == 0:
        resume = ["--resume"] if os.path.exists(arguments[arguments.index("--output-dir") + 1] + "/last.pt") else []
        sys.argv = ["student.py", *arguments, *resume]
        cli.run(student.main, student.Options)
        os._exit(0)
    end = time.monotonic() + (moments.uniform(0.05, 2.5) if killed < kills else 1e9)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        killed += 1
        _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        if os.WEXITSTATUS(status):
            sys.exit(1)
        if killed >= kills:
            break
        os.remove(arguments[arguments.index("--output-dir") + 1] + "/last.pt")  # it got through: once more
        os.remove(arguments[arguments.index("--output-dir") + 1] + "/previous.pt")
print("kills", killed)
"""


@pytest.mark.slow
def test_twenty_kills_change_nothing(command: Command, scenes: Path, tmp_path: Path) -> None:
    """Killed twenty times at random, with workers, saving after every step: the bits of a run left alone."""
    flags = (*RUN[1:], "--datadir", scenes, "--num-workers", 1, "--save-every", 0)
    whole = command(RUN[0], *flags, "--output-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    driver = KILLER.format(root=str(ROOT))
    flags = (*flags, "--output-dir", tmp_path / "killed", 20)
    killed = command(
        "-c", driver, *flags, TRANSKD_CACHE=str(tmp_path / "cache")
    )  # built anew, under fire
    assert killed.returncode == 0, killed.stderr
    assert killed.stdout.strip().endswith("kills 20")
    for name in ("student.safetensors", "student_best.safetensors"):
        assert_equal(tmp_path / "whole" / name, tmp_path / "killed" / name)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, code: int, command: Command, scenes: Path, tmp_path: Path
) -> None:
    flags = [
        str(f)
        for f in (*RUN, "--datadir", scenes, "--output-dir", tmp_path / "run", "--max-steps", 100)
    ]
    process = subprocess.Popen(
        [sys.executable, *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch"):  # training has begun
            break
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(60) == code
    assert "--resume" in rest and "Traceback" not in rest
    step = int(rest.split("interrupted at step ")[1].split(";")[0])
    assert 1 <= step < 100
    again = command(
        *RUN,
        "--datadir",
        scenes,
        "--output-dir",
        tmp_path / "run",
        "--max-steps",
        step + 1,
        "--resume",
    )
    assert again.returncode == 0, again.stderr
    assert [r["step"] for r in records(tmp_path / "run") if r["event"] == "train"] == list(
        range(1, step + 2)
    )


def test_a_loss_that_is_not_a_number_stops_the_run(
    command: Command, scenes: Path, tmp_path: Path
) -> None:
    flags = (*RUN, "--datadir", scenes, "--output-dir", tmp_path / "run", "--lr", 1e20)
    done = command(*flags, "--steps-loss", 3)
    assert done.returncode == 2
    assert (
        "the loss ce is" in done.stderr
        and "images leftImg8bit/train/" in done.stderr
        and "--lr" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "student.safetensors").exists()  # no spoilt weights


def test_an_epochs_last_step_that_spoils_the_network(
    command: Command, scenes: Path, tmp_path: Path
) -> None:
    """No loss shows it: its weights are finite, and what they give is not."""
    flags = (
        *RUN,
        "--datadir",
        scenes,
        "--output-dir",
        tmp_path / "run",
        "--batch-size",
        10,
        "--validate-every",
        1,
    )
    done = command(*flags, "--lr", 1e20)
    assert done.returncode == 2 and "outputs are NaN" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "run").glob("*.safetensors")) and not list(
        (tmp_path / "run").glob("*.pt")
    )


def test_weights_that_are_not_numbers_are_not_saved(scenes: Path, tmp_path: Path) -> None:
    """A gradient that overflows behind a finite loss, in the step before a save."""

    def spoil(distiller: Distiller) -> None:
        distiller.student.linear_pred.weight.register_hook(
            lambda gradient: gradient * (torch.nan if distiller.steps == 3 else 1)
        )
        distiller.register_forward_pre_hook(
            lambda *_: setattr(distiller, "steps", getattr(distiller, "steps", 0) + 1)
        )

    options = options_of(tmp_path, scenes, max_steps=5, save_every=0.0)
    setup = engine.start(options)
    distiller = Distiller(options.student(setup.classes), setup.classes.weights)
    spoil(distiller)
    with pytest.raises(UserError, match=r"step 3 made weights NaN.*what was saved before is kept"):
        engine.train(distiller, setup, options)
    assert load_checkpoint(tmp_path / "run")["state"]["step"] == 2


def test_images_of_one_colour(command: Command, tmp_path: Path) -> None:
    """LayerNorm multiplies their gradients by 1/sqrt(eps) in every block, and they overflow."""
    write_dataset(
        tmp_path / "data", dataset="cityscapes", train=2, val=1, height=64, width=128, seed=3
    )
    for image in (tmp_path / "data" / "leftImg8bit" / "train").rglob("*.png"):
        Image.new("RGB", (128, 64)).save(image)
    done = command(
        *RUN, "--datadir", tmp_path / "data", "--output-dir", tmp_path / "run", "--max-steps", 1
    )
    assert done.returncode == 2
    assert (
        "step 1 made weights NaN" in done.stderr.splitlines()[-1] and "single colour" in done.stderr
    )


def test_full_disk(command: Command, scenes: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk: the write fails half-way."""
    flags = (*RUN, "--datadir", scenes, "--output-dir", tmp_path / "run")
    assert command(*flags, "--max-steps", 2).returncode == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    done = subprocess.run(
        [sys.executable, *map(str, flags), "--max-steps", "4", "--resume"],
        cwd=ROOT,
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1].startswith("error: can't write")
        and "Traceback" not in done.stderr
    )
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    again = command(*flags, "--max-steps", 4, "--resume")
    assert again.returncode == 0, again.stderr
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def test_damaged_last_checkpoint(command: Command, scenes: Path, tmp_path: Path) -> None:
    """The one before it is taken, with a warning, and the result is the same."""
    for name in ("whole", "damaged"):
        flags = (*RUN, "--datadir", scenes, "--output-dir", tmp_path / name, "--save-every", 0)
        assert command(*flags, "--max-steps", 4).returncode == 0
    last = tmp_path / "damaged" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    for name in ("whole", "damaged"):
        flags = (*RUN, "--datadir", scenes, "--output-dir", tmp_path / name, "--save-every", 0)
        done = command(*flags, "--max-steps", 6, "--resume")
        assert done.returncode == 0, done.stderr
        assert ("is damaged" in done.stderr) == (name == "damaged")
    assert_equal(
        tmp_path / "whole" / "student.safetensors", tmp_path / "damaged" / "student.safetensors"
    )


def test_empty_last_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a power cut may leave it."""
    (tmp_path / "last.pt").touch()
    with pytest.raises(
        UserError, match=r"no whole checkpoint in .* to go on from \(.+\); start again"
    ):
        load_checkpoint(tmp_path)
    content = {
        "model": {},
        "optimizer": {"param_groups": []},
        "state": {"step": 3},
        "random": [[None]],
    }
    torch.save(content, tmp_path / "previous.pt")
    assert load_checkpoint(tmp_path) == content
    assert "last.pt is damaged (" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other", [[1], {"a": torch.zeros(1)}, {"state": 5}, {"random": 5}, {"metadata": 5}], ids=str
)
def test_what_is_no_checkpoint_is_damaged(
    other: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a released file that was copied over it."""
    content = {
        "model": {},
        "optimizer": {"param_groups": []},
        "state": {"step": 3},
        "random": [[None]],
    }
    whole = {"state", "random", "metadata"} & set(
        other
    )  # of what a checkpoint holds, one is of another form
    torch.save(content | other if whole else other, tmp_path / "last.pt")
    torch.save(content, tmp_path / "previous.pt")
    assert load_checkpoint(tmp_path) == content
    assert "last.pt is damaged (it is another program's)" in capsys.readouterr().err


def test_two_runs_in_one_folder(command: Command, scenes: Path, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = command(*RUN, "--datadir", scenes, "--output-dir", tmp_path)
    assert done.returncode == 2 and "another run writes into" in done.stderr


def test_demo_in_a_folder_named_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands run in the repository, and write to the folder that the user meant."""
    commands: list[list[str]] = []

    def fail(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(UserError, match="ended with exit code 1"):
        demo.main(demo.Options(output_dir=Path("out")))
    assert str(tmp_path / "out" / "data" / "cityscapes") in commands[0]


def test_folder_that_cannot_be_written(command: Command, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command(*RUN, "--datadir", scenes, "--output-dir", tmp_path / "file" / "run")
    assert done.returncode == 2 and "--output-dir" in done.stderr and "Traceback" not in done.stderr


def test_resume_refuses_other_options(command: Command, scenes: Path, tmp_path: Path) -> None:
    flags = (*RUN, "--datadir", scenes, "--output-dir", tmp_path / "run", "--max-steps", 2)
    assert command(*flags).returncode == 0
    changed = ("--resume", "--lr", 1e-4, "--weight-decay", 0.5, "--subset-every", 2)
    done = command(*flags, *changed)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert (
        "lr 0.0001 instead of 6e-05" in error
        and "subset_every 2 instead of 1" in error
        and "--override" in error
    )
    assert json.loads((tmp_path / "run" / "options.json").read_text())["lr"] == 6e-5
    assert command(*flags, *changed, "--override", "--max-steps", 3).returncode == 0
    last = [r for r in records(tmp_path / "run") if r["event"] == "train"][-1]
    assert last["step"] == 3 and last["lr"] == pytest.approx(
        1e-4, rel=0.01
    )  # the option in force, not the old one
    (group,) = load_checkpoint(tmp_path / "run")["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5


def test_corrupt_image_in_the_middle(command: Command, tmp_path: Path) -> None:
    write_dataset(
        tmp_path / "data", dataset="cityscapes", train=6, val=2, height=64, width=128, seed=3
    )
    broken = sorted((tmp_path / "data" / "leftImg8bit" / "train").rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:400])
    for cache in ("--cache", "--no-cache"):
        done = command(
            *RUN, "--datadir", tmp_path / "data", "--output-dir", tmp_path / cache, cache
        )
        assert done.returncode == 2
        assert str(broken) in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_data_removed_during_the_run(command: Command, tmp_path: Path) -> None:
    write_dataset(
        tmp_path / "data", dataset="cityscapes", train=6, val=2, height=64, width=128, seed=3
    )
    flags = (*RUN, "--datadir", tmp_path / "data", "--output-dir", tmp_path / "run", "--no-cache")
    assert command(*flags, "--max-steps", 2).returncode == 0
    script = (
        "import cli, train.engine as engine, pathlib, sys\n"
        "from train import student\n"
        "validate = engine.evaluate\n"
        "def remove_then_validate(*a, **k):\n"
        "    result = validate(*a, **k)\n"
        f"    [p.unlink() for p in pathlib.Path({str(tmp_path / 'data')!r}).rglob('train/**/*.png')]\n"
        "    return result\n"
        "engine.evaluate = remove_then_validate\n"
        "cli.run(student.main, student.Options)\n"
    )
    done = command("-c", script, *flags[1:], "--max-steps", 12, "--resume")
    assert done.returncode == 2
    assert "is gone" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "last.pt").exists()


def test_provenance(command: Command, scenes: Path, tmp_path: Path) -> None:
    assert (
        command(
            *RUN, "--datadir", scenes, "--output-dir", tmp_path / "run", "--max-steps", 1
        ).returncode
        == 0
    )
    begin = records(tmp_path / "run")[0]
    assert begin["event"] == "start" and {"python", "torch", "numpy", "pillow"} <= set(
        begin["versions"]
    )
    assert "--datadir" in begin["command"] and begin["device"]
    options = json.loads((tmp_path / "run" / "options.json").read_text())
    assert options["parameters"] == 3_719_284 and len(options["data"]) == 20


def test_label_of_another_size(command: Command, tmp_path: Path) -> None:
    write_dataset(
        tmp_path / "data", dataset="cityscapes", train=2, val=1, height=64, width=128, seed=3
    )
    label = next((tmp_path / "data" / "gtFine" / "train").rglob("*.png"))
    Image.open(label).resize((32, 16)).save(label)
    done = command(*RUN, "--datadir", tmp_path / "data", "--output-dir", tmp_path / "run")
    assert done.returncode == 2 and label.name in done.stderr.splitlines()[-1]


def test_out_of_memory(command: Command) -> None:
    script = (
        "import cli, torch\nfrom dataclasses import dataclass\n@dataclass\nclass O: pass\n"
        "def main(options): torch.empty(10**15)\ncli.run(main, O)"
    )
    done = command("-c", script)
    assert done.returncode == 2 and "--batch-size" in done.stderr and "Traceback" not in done.stderr
