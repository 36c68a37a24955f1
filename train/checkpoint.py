"""What a run writes into its folder, and how it is resumed from there.

options.json, metrics.jsonl, last.pt (everything that decides the run's future), and the network
alone as student.safetensors and student_best.safetensors. Files are written aside and renamed, so
that at every moment there is a whole checkpoint. The one before the last is kept as previous.pt, in
case the last turns out to be damaged.
"""

import hashlib
import logging
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch
from torch.optim import Optimizer

from errors import UserError
from files import ROOT, atomic_write, read_json, write_json
from models import SegmentationModel, save_model
from models.checkpoints import read_metadata
from models.distillation import Distiller
from models.loading import metadata_of, pickled
from train import distributed
from train.optimisation import Plan
from train.setup import CHECKPOINTS, Run

log = logging.getLogger(__name__)


@dataclass
class State:
    """Where a run stands."""

    epoch: int = 1  # the epoch under way, from 1
    batch: int = 0  # its steps that are done
    step: int = 0  # steps done in all
    best: float = -1.0  # best validation mIoU so far


# ------------------------------------------------------------------------------ writing


def save(
    run: Run,
    distiller: Distiller,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    state: State,
) -> None:
    """Write last.pt, by the main process; the one before becomes previous.pt.

    Raises UserError if it can't be written; the one before is still there.
    """
    # Dropout's draws differ between processes: each continues with its own random state.
    cuda_state = torch.cuda.get_rng_state() if run.is_cuda else None
    random = distributed.all_gather_object([torch.get_rng_state(), cuda_state])
    if not distributed.is_main_process():
        return
    content = {
        "model": distiller.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "state": asdict(state),
        "random": random,
        "metadata": metadata_of(distiller.student, **facts_of(run, state)),
    }
    path = run.options.run_dir / "last.pt"
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            file.write(pickled(content))
            file.flush()
            os.fsync(file.fileno())
        # Killed between this and the next renaming, a run is continued from previous.pt.
        if path.is_file() and not path.is_symlink():
            path.replace(path.with_name("previous.pt"))


def save_weights(
    run: Run, network: SegmentationModel, state: State, score: float, suffix: str = ""
) -> None:
    """Write the network's weights alone."""
    if distributed.is_main_process():
        path = run.options.run_dir / f"{run.options.network}{suffix}.safetensors"
        save_model(network, path, **facts_of(run, state), mean_iou=score)


def facts_of(run: Run, state: State) -> dict[str, Any]:
    """What weights tell about where they come from."""
    data = run.options.data
    return {
        "method": run.options.method,
        "dataset": data.dataset,
        "height": data.height,
        "step": state.step,
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """When and with what a run was made: Unix time, command, versions, device, git revision."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
        revision = git.stdout.strip() or None
    except OSError:  # no git here
        revision = None
    is_cuda = device.type == "cuda"
    return {
        "command": sys.argv,
        "time": time.time(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "pillow": PIL.__version__,
        },
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "revision": revision,
    }


# ------------------------------------------------------------------------------ continuing


def begin(
    run: Run,
    distiller: Distiller,
    teacher: SegmentationModel | None,
    plan: Plan,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
) -> State:
    """Start the run or, with `--resume`, load its last checkpoint; then write options.json.

    Raises UserError if the processes, or the run that is continued, were given something else that
    decides the result, or if there is no checkpoint of this method and model.
    """
    decided = require_same_run(run, distiller, teacher, plan)
    resumed = run.options.run.resume is not None
    state = restore(run, distiller, optimizer, scaler) if resumed else State()
    with distributed.fail_in_all_processes():
        if distributed.is_main_process():
            write_json(decided, run.options.run_dir / "options.json")
    return state


def require_same_run(
    run: Run, distiller: Distiller, teacher: SegmentationModel | None, plan: Plan
) -> dict[str, Any]:
    """What decides the result, compared with the other processes' and with the resumed run's.

    Raises UserError if one was given something else.
    """
    options = run.options
    facts = {
        "parameters": sum(p.numel() for p in distiller.student.parameters()),
        "data": run.train_set.identity(),
        "val_data": run.val_set.identity(),
        "teacher": None if teacher is None else fingerprint(teacher),
        "world_size": distributed.world_size(),
    }
    if options.recipe.schedule == "step":
        facts["decay_steps"] = plan.steps
    # Processes may have paths of their own, but must have the same data, teacher and normalisation.
    # The student's weights are process 0's: DistributedDataParallel sends them to the others.
    alike = options.as_json(without="local") | facts
    alike["input's normalisation"] = repr(distiller.student.normalisation)
    distributed.require_same(alike | {"device": run.device.type})
    now = options.as_json() | facts
    before: dict[str, Any] = {}
    with distributed.fail_in_all_processes():
        if distributed.is_main_process() and options.run.resume is not None:
            before = read_json(options.run_dir / "options.json") or {}
        deciding = options.as_json(without="free").keys() | facts.keys()  # files may have moved
        changed = [
            f"{key} {now[key]} instead of {before[key]}"
            for key in sorted(deciding & before.keys())
            if before[key] != now[key]
        ]
        if changed and not options.run.override:
            raise UserError(
                f"--resume with other options than {options.run_dir} began with would change its "
                f"result: {'; '.join(changed)}; give the same ones, another --output-dir, or "
                "--override to insist"
            )
    return now


def fingerprint(model: SegmentationModel) -> str:
    """Hash of a network's weights, and of what it does to its input."""
    # The file's name and format don't count: a teacher that was moved or converted is the same.
    digest = hashlib.sha256(repr(model.normalisation).encode() if model.normalisation else b"")
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:20]


def restore(
    run: Run, distiller: Distiller, optimizer: Optimizer, scaler: torch.amp.GradScaler
) -> State:
    """Load the last checkpoint into everything that a run consists of.

    Raises UserError if there is none, or it belongs to another method or model.
    """
    folder = run.options.run_dir
    with distributed.fail_in_all_processes():
        content = load_checkpoint(folder) if distributed.is_main_process() else None
    content = distributed.broadcast_object(content)  # nodes need not see each other's disks
    # --override may have changed weight decay and the like: the options count, not the checkpoint.
    chosen = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        distiller.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        state = State(**content["state"])
        states = content["random"]
        # More processes than before, which takes --override: their draws begin anew.
        rank = distributed.rank()
        own, own_cuda = states[rank] if rank < len(states) else (None, None)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the checkpoint in {folder} is of another method ({reason})") from error
    for group, numbers in zip(optimizer.param_groups, chosen, strict=True):
        group.update(numbers)
    told = read_metadata(content["metadata"], folder)
    distiller.student.normalisation = told["normalisation"]
    if own is not None:
        torch.set_rng_state(own)
    if own_cuda is not None and run.is_cuda:
        torch.cuda.set_rng_state(own_cuda)
    return state


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The last checkpoint that is whole. Raises UserError if there is none."""
    problem = ""
    # last.pt, and if that is damaged previous.pt.
    for path in (folder / name for name in CHECKPOINTS):
        if not path.exists():
            continue
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not {"model", "optimizer", "state", "random"} <= content.keys():
                raise ValueError("it is another program's")
        except Exception as error:  # a damaged file makes pickle raise anything
            problem = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
            log.warning("%s is damaged (%s)", path, problem)
            continue
        if path.name != "last.pt":
            log.warning("continuing from %s, step %d", path, content["state"]["step"])
        return content
    advice = "train in another folder" if problem else "leave --resume out"
    raise UserError(f"no whole checkpoint in {folder} ({problem or 'there is none'}); {advice}")
