"""A run's folder: who may write into it, what is kept in it, and how a run is taken up again.

Files are written aside and renamed, so that at every moment there is a whole checkpoint. The one before the last is
kept as previous.pt, for the day on which the last turns out to be damaged.
"""

import fcntl
import io
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy
import PIL
import torch

from errors import UserError
from eval.records import fits
from files import atomic_write, read_json, write_json
from train.options import ROOT, TrainingOptions

CHECKPOINTS = ("last.pt", "previous.pt")
"""The checkpoints that a run can be taken up from, the newer one first."""

CHECKPOINT: dict[Any, Any] = {
    "model": dict,
    "optimizer": {"param_groups": list},
    "state": {...: int | float},
}
CHECKPOINT |= {"random": [list], "metadata": {...: str}}
"""What is in them, see `eval.records.fits`; those of earlier versions have no metadata."""

FREE = frozenset(
    [
        "output_dir",
        "resume",
        "override",
        "datadir",
        "train_list",
        "teacher_weights",
        "student_weights",
        "cache",
        "num_workers",
        "num_epochs",
        "max_steps",
        "device",
        "validate_every",
        "validate_teacher",
        "save_every",
        "steps_loss",
        "tensorboard",
        "visualize",
        "port",
    ]
)
"""Options that a resumed run may change: they don't change what is computed.

Data and teacher may move: their content is compared.
"""


class RunFolder:
    """The folder of one run, claimed for this process.

    Raises:
        UserError: it can't be written, another process writes into it, it holds a run and `--resume` was not given, or
            `--resume` was given and there is none.
    """

    def __init__(self, options: TrainingOptions) -> None:
        self.path = options.run_dir
        self.lock = claim(self.path, "run")
        begun = holds_run(self.path)
        if begun and not options.resume:
            raise UserError(
                f"{self.path} already holds a run; add --resume to go on with it, or choose another --output-dir"
            )
        if options.resume and not begun:
            raise UserError(
                f"no checkpoint in {self.path} to go on from; leave --resume out to start a run"
            )
        if not options.resume:
            for name in ("metrics.jsonl", "eval.json"):  # of a run whose checkpoints were removed
                (self.path / name).unlink(missing_ok=True)

    def compare(self, options: TrainingOptions, **facts: Any) -> None:
        """Compare options, and facts about data and networks, with those of the run; keep them for `describe`.

        Raises:
            UserError: a resumed run differs in something that changes its result.
        """
        self.description = now = options.as_json() | facts
        before = (read_json(self.path / "options.json") if options.resume else None) or {}
        changed = [
            f"{key} {now.get(key)} instead of {before[key]}"
            for key in before
            if key not in FREE and before[key] != now.get(key)
        ]
        if changed and not options.override:
            raise UserError(
                f"--resume with other options than {self.path} began with would change its result: "
                f"{'; '.join(changed)}; give the same ones, or --override to insist"
            )

    def describe(self) -> None:
        """Write options.json."""
        write_json(self.description, self.path / "options.json")

    def save(self, content: dict[str, Any], *, best: bool = False) -> None:
        """Write a checkpoint, last.pt or best.pt.

        Raises:
            UserError: it could not be written; the one before is still there.
        """
        path = self.path / ("best.pt" if best else "last.pt")
        with atomic_write(path) as aside:
            buffer = io.BytesIO()
            torch.save(content, buffer)
            with aside.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if not best and path.exists():
                with atomic_write(self.path / "previous.pt") as link:
                    try:
                        link.hardlink_to(path)
                    except OSError:  # a file system without links
                        shutil.copyfile(path, link)


def claim(folder: Path, what: str) -> TextIO:
    """Make a folder, and lock it for this process until the file that is returned is closed.

    Raises:
        UserError: it can't be written, or another process has locked it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
        # lockf, not flock: data-loading workers that outlive a killed run must not keep its lock
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another {what} writes into {folder}; choose another --output-dir"
        ) from error
    except OSError as error:
        raise UserError(
            f"can't write to {folder} ({error.strerror}); choose another --output-dir"
        ) from error
    return lock


def holds_run(folder: Path) -> bool:
    """Whether a run was begun there that can be taken up."""
    return any((folder / name).exists() for name in CHECKPOINTS)


def load_checkpoint(run_dir: Path) -> dict[str, Any]:
    """The last checkpoint that is whole.

    Raises:
        UserError: there is none.
    """
    problem = ""
    for name in CHECKPOINTS:
        path = run_dir / name
        if not path.exists():
            continue
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not fits(content, CHECKPOINT) or CHECKPOINT.keys() - content.keys() - {"metadata"}:
                raise ValueError("it is another program's")
        except Exception as error:
            problem = (str(error) or type(error).__name__).splitlines()[
                0
            ]  # an empty file's error says nothing
            problem = problem.split(". ")[0]  # torch's goes on about its flags
            print(f"warning: {path} is damaged ({problem})", file=sys.stderr)
            continue
        if name == "previous.pt":
            print(
                f"warning: going on from {path}, step {content['state']['step']}", file=sys.stderr
            )
        return content
    raise UserError(
        f"no whole checkpoint in {run_dir} to go on from ({problem}); start again in another --output-dir"
    )


def provenance(device: torch.device) -> dict[str, Any]:
    """When and with what a run was made: Unix time, command, versions, device, git revision."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return {
        "command": sys.argv,
        "time": time.time(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "pillow": PIL.__version__,
        },
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine(),
        "threads": torch.get_num_threads(),
        "revision": git.stdout.strip() or None,
    }
