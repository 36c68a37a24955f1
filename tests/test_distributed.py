"""Two processes compute what one computes with the same global batch."""

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


@pytest.mark.slow
def test_two_processes(command: Command, scenes: Path, teacher_weights: Path, tmp_path: Path) -> None:
    """Without dropout, whose draws each process makes for itself; BatchNorm sees the same images at a time in both.

    Seven images: the second batch of four lacks one, so that a process has one image and the other two.
    """
    names = sorted(p.name for p in (scenes / "leftImg8bit" / "train").rglob("*.png"))
    listed = tmp_path / "seven.txt"
    listed.write_text("\n".join(names[:7]))
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


def test_parts_count_as_the_whole_batch() -> None:
    """Parts of unequal size and weight: what the losses average to is what the whole batch gives."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 20, 4, 8), torch.randint(0, 20, (3, 4, 8), dtype=torch.uint8)
    labels[2, :3] = 19  # mostly ignored
    weights = torch.tensor(CITYSCAPES.weights)
    parts = [
        Batch(torch.empty(n, 3, 16, 32), part, torch.arange(n)) for n, part in zip((2, 1), labels.split(2), strict=True)
    ]
    share = shares(parts, weights, Ranks("cpu"))
    ce = [cross_entropy(x, y, weights) for x, y in zip(logits.split(2), labels.split(2), strict=True)]
    mse = [x.square().mean() for x in logits.split(2)]
    found = torch.stack([torch.stack(ce), torch.stack(mse)], dim=1).mul(share).mean(0)
    whole = torch.stack([cross_entropy(logits, labels, weights), logits.square().mean()])
    torch.testing.assert_close(found, whole)
    assert (torch.stack(ce).mean() - whole[0]).abs() > 1e-2  # what a plain average would be off by


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted the Linux way")
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
    assert [(tmp_path / f"said{rank}").read_text() for rank in (0, 1)] == ["[True, None, False]"] * 2


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}])
def test_half_of_torchruns_variables(command: Command, scenes: Path, tmp_path: Path, variables: dict[str, str]) -> None:
    done = command("train/student.py", "--datadir", scenes, *SMALL, "--output-dir", tmp_path / "run", **variables)
    assert done.returncode == 2 and "torchrun" in done.stderr and "Traceback" not in done.stderr


def test_batch_that_cannot_be_shared(command: Command, scenes: Path, tmp_path: Path) -> None:
    done = command("train/student.py", "--datadir", scenes, *SMALL, "--accumulate", 3, "--output-dir", tmp_path / "run")
    assert done.returncode == 2 and "multiple of 3" in done.stderr
