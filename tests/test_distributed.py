"""Two processes compute what one computes with the same global batch."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets import open_split
from datasets.classes import CITYSCAPES
from datasets.loading import Batch
from eval.inference import evaluate
from models import load_model
from models.distillation.losses import cross_entropy
from tests.conftest import ROOT, Command, free_port
from tests.test_training import SMALL, assert_equal, records
from train.distributed import Ranks
from train.engine import shares


def torchrun(command: Command, *arguments: object, **more: Any):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-addr", "127.0.0.1")
    return command(*launcher, "--master-port", free_port(), *arguments, **more)


def student_after(lines: str, folder: Path) -> Path:
    """A script like train/student.py, before which each process, whose number is `rank`, executes `lines`."""
    script = folder / "student.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import cli\n"
        "from models.distillation import Distiller\n"
        "from train import student\n"
        "rank = int(os.environ['RANK'])\n"
        f"{lines}\n"
        "cli.run(student.main, student.Options)\n"
    )
    return script


def at_step(step: int, what: str) -> str:
    """Lines that execute `what` in process 1 ahead of its training step `step`."""
    return (
        "forward, steps = Distiller.forward, []\n"
        "def instead(self, *batch):\n"
        "    steps.append(batch)\n"
        f"    if rank == 1 and len(steps) == {step}:\n"
        f"        {what}\n"
        "    return forward(self, *batch)\n"
        "Distiller.forward = instead\n"
    )


@pytest.mark.slow
def test_two_processes(
    command: Command, scenes: Path, teacher_weights: Path, tmp_path: Path
) -> None:
    """Without dropout, whose draws each process makes for itself; BatchNorm sees the same images at a time in both.

    Seven images: the second batch of four lacks one, so that a process has one image and the other two.
    """
    names = sorted(p.name for p in (scenes / "leftImg8bit" / "train").rglob("*.png"))
    listed = tmp_path / "seven.txt"
    listed.write_text("\n".join(names[:7]))
    flags = [
        "train/TransKDBase.py",
        "--datadir",
        scenes,
        "--teacher-weights",
        teacher_weights,
        *SMALL,
    ]
    flags += ["--train-list", listed, "--batch-size", 4, "--max-steps", 5, "--validate-every", 5]
    flags += ["--drop-path-rate", 0, "--dropout", 0, "--lr", 1e-4]
    one = command(*flags, "--accumulate", 2, "--output-dir", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    two = torchrun(command, *flags, "--output-dir", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    first, second = (
        [r for r in records(tmp_path / n) if r["event"] == "train"] for n in ("one", "two")
    )
    assert len(first) == len(second) == 5
    for a, b in zip(first, second, strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-5 if a["step"] == 1 else 1e-3)
    for name in ("one", "two"):  # what is logged is what the saved network scores
        student = load_model(tmp_path / name / "student.safetensors")
        found = evaluate(
            student, open_split("cityscapes", scenes, "val", height=64, cache=False), progress=False
        )
        logged = next(r for r in records(tmp_path / name) if r["event"] == "val")
        assert found.as_json()["mean_iou"] == pytest.approx(logged["mean_iou"], abs=1e-6)
    counted = [
        next(r for r in records(tmp_path / n) if r["event"] == "val")["images"]
        for n in ("one", "two")
    ]
    assert counted == [4, 4]


@pytest.mark.slow
def test_two_processes_resume_exactly(command: Command, scenes: Path, tmp_path: Path) -> None:
    """After a signal that process 1 alone got, in mid-epoch; it has a disk of its own, on which nothing is."""
    flags = (
        "--datadir",
        scenes,
        *SMALL,
        "--batch-size",
        4,
        "--validate-every",
        2,
        "--max-steps",
        6,
    )
    own_folder = "sys.argv[-1] += '' if rank == 0 else '_of_1'\n"
    interrupted = student_after(own_folder + at_step(4, "os.kill(os.getpid(), 15)"), tmp_path)
    whole = torchrun(command, "train/student.py", *flags, "--output-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    first = torchrun(command, interrupted, *flags, "--output-dir", tmp_path / "parts")
    assert first.returncode == 1 and "interrupted at step 4" in first.stderr
    again = torchrun(
        command,
        student_after(own_folder, tmp_path),
        *flags,
        "--resume",
        "--output-dir",
        tmp_path / "parts",
    )
    assert again.returncode == 0, again.stderr
    assert_equal(
        tmp_path / "whole" / "student.safetensors", tmp_path / "parts" / "student.safetensors"
    )
    assert not (tmp_path / "parts_of_1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            "sys.argv += ['--subset-every', '2'] * rank",
            "process 1 has another subset_every, data than process 0",
        ),
        ("sys.argv += ['--student-weights', 'none'] * rank", "process 1: no weights at none"),
        (
            at_step(2, "from errors import UserError; raise UserError('broken')"),
            "another process has ended",
        ),
    ],
)
def test_what_fails_in_one_process_ends_all(
    lines: str, told: str, command: Command, scenes: Path, tmp_path: Path
) -> None:
    """Without torchrun, which would end the other: as on two nodes, where it would wait, or tell how gloo lost it."""
    script = student_after(lines, tmp_path)
    more = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with ThreadPoolExecutor() as threads:
        flags = (script, "--datadir", scenes, *SMALL, "--output-dir", tmp_path / "run")
        both = [threads.submit(command, *flags, RANK=str(rank), **more) for rank in (0, 1)]
    for done in (future.result() for future in both):
        assert done.returncode == 2 and "Traceback" not in done.stderr
    assert told in both[0].result().stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--device", "cuda:1"), "--device cuda:1 is one GPU for all processes"),
        (
            ("--compile", "--compile-mode", "reduce-overhead"),
            "--compile-mode reduce-overhead is for one process",
        ),
    ],
)
def test_flags_of_one_process(
    flags: tuple[str, ...], says: str, command: Command, scenes: Path, tmp_path: Path
) -> None:
    done = torchrun(
        command,
        "train/student.py",
        "--datadir",
        scenes,
        *SMALL,
        "--output-dir",
        tmp_path / "run",
        *flags,
    )
    assert done.returncode != 0 and says in done.stderr and not (tmp_path / "run").exists()


def test_parts_count_as_the_whole_batch() -> None:
    """Parts of unequal size and weight: what the losses average to is what the whole batch gives."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 20, 4, 8), torch.randint(0, 20, (3, 4, 8), dtype=torch.uint8)
    labels[2, :3] = 19  # mostly ignored
    weights = torch.tensor(CITYSCAPES.weights)
    parts = [
        Batch(torch.empty(n, 3, 16, 32), part, torch.arange(n))
        for n, part in zip((2, 1), labels.split(2), strict=True)
    ]
    share = shares(parts, weights, Ranks("cpu"))
    ce = [
        cross_entropy(x, y, weights) for x, y in zip(logits.split(2), labels.split(2), strict=True)
    ]
    mse = [x.square().mean() for x in logits.split(2)]
    found = torch.stack([torch.stack(ce), torch.stack(mse)], dim=1).mul(share).mean(0)
    whole = torch.stack([cross_entropy(logits, labels, weights), logits.square().mean()])
    torch.testing.assert_close(found, whole)
    assert (torch.stack(ce).mean() - whole[0]).abs() > 1e-2  # what a plain average would be off by


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="threads are counted the Linux way"
)
@pytest.mark.slow
def test_no_thread_outlives_the_group(command: Command, scenes: Path, tmp_path: Path) -> None:
    """One that is still at work while the interpreter ends may abort it, and a launcher then waits for minutes."""
    script = tmp_path / "two.py"
    script.write_text(
        "import cli\n"
        "from pathlib import Path\n"
        "from train.distributed import Ranks\n"
        "from train.student import Options, main\n"
        "leave = Ranks.leave\n"
        "gloo = lambda: any('gloo' in p.read_text() for p in Path('/proc/self/task').glob('*/comm'))\n"
        "def say(ranks):\n"
        "    told = [gloo(), leave(ranks), gloo()]\n"
        "    Path(f'said{ranks.rank}').write_text(str(told))\n"
        "Ranks.leave = say\n"
        "cli.run(main, Options)\n"
    )
    flags = ("--datadir", scenes, *SMALL, "--max-steps", 1, "--output-dir", tmp_path / "run")
    done = torchrun(command, script, *flags, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"said{rank}").read_text() for rank in (0, 1)] == [
        "[True, None, False]"
    ] * 2


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}])
def test_half_of_torchruns_variables(
    command: Command, scenes: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    done = command(
        "train/student.py",
        "--datadir",
        scenes,
        *SMALL,
        "--output-dir",
        tmp_path / "run",
        **variables,
    )
    assert done.returncode == 2 and "torchrun" in done.stderr and "Traceback" not in done.stderr


def test_batch_that_cannot_be_shared(command: Command, scenes: Path, tmp_path: Path) -> None:
    done = command(
        "train/student.py",
        "--datadir",
        scenes,
        *SMALL,
        "--accumulate",
        3,
        "--output-dir",
        tmp_path / "run",
    )
    assert done.returncode == 2 and "multiple of 3" in done.stderr
