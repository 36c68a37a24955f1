"""The one training loop: distillation with any method, teachers and students alone.

A run is a folder: options.json, metrics.jsonl, last.pt and best.pt (everything that decides the run's future),
student.safetensors and student_best.safetensors (the bare network). Data order and augmentation are functions of
(seed, epoch, image), so a run goes on in mid-epoch from a step count and torch's random state alone.
"""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import PolynomialLR

from cli import UserError, find_device
from datasets import SceneDataset, open_split
from datasets.classes import Classes
from datasets.loading import training_batches
from datasets.transforms import to_float
from eval.inference import evaluate
from models import save_model
from models.distillation import Distiller
from train.options import TrainingOptions
from train.tracking import Tracker


@dataclass
class State:
    """Where a run stands."""

    epoch: int = 1  # the epoch under way, from 1
    batch: int = 0  # its batches that are done
    step: int = 0  # steps done in all
    best: float = -1.0  # best validation mIoU so far


def start(options: TrainingOptions) -> tuple[tuple[SceneDataset, SceneDataset], Classes]:
    """Seed everything and open the training and the validation split.

    Called before the networks are built, so that one seed gives every method the same student.
    """
    torch.manual_seed(options.seed)
    common: dict[str, Any] = {"height": options.height, "cache": options.cache}
    train = open_split(
        options.dataset,
        options.datadir,
        "train",
        every=options.subset_every,
        list_file=options.train_list,
        augment=options.augmentation,
        **common,
    )
    return (train, open_split(options.dataset, options.datadir, "val", **common)), train.classes


def train(distiller: Distiller, data: tuple[SceneDataset, SceneDataset], options: TrainingOptions) -> None:
    """Train `distiller.student` and keep its last and best weights in the run's folder.

    Raises:
        UserError: the folder holds another run, or `--resume` finds none.
    """
    train_set, val_set = data
    device = find_device(options.device)
    parameters = sum(p.numel() for p in distiller.student.parameters())
    run_dir = open_run_dir(options, parameters)
    distiller.to(device)
    optimizer, schedule = recipe(distiller, options)
    state = State()
    torch.manual_seed(options.seed)  # building other modules drew other numbers; dropout is to be the same
    if options.resume:
        state = restore(run_dir, distiller, optimizer, schedule, device)

    steps_per_epoch = math.ceil(len(train_set) / options.batch_size)
    total_steps = min(options.num_epochs * steps_per_epoch, options.max_steps or math.inf)
    saved = time.monotonic()

    def save(name: str) -> None:
        nonlocal saved
        save_checkpoint(run_dir / name, distiller, optimizer, schedule, state, options, device)
        saved = time.monotonic()

    def validate(tracker: Tracker, model: nn.Module, event: str = "val") -> float:
        scores = evaluate(
            model,
            val_set,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            device=device,
            progress=False,
        ).as_json(weights="")
        del scores["weights"]
        tracker.validated(state.epoch, scores, event)
        return scores["mean_iou"] or 0.0

    with Tracker(run_dir, int(total_steps), state.step, options.steps_loss, options.tensorboard) as tracker:
        tracker.say(
            f"{options.method}: {len(train_set)} training and {len(val_set)} validation images, "
            f"{steps_per_epoch} steps an epoch, {total_steps} in all, on {device}, in {run_dir}"
        )
        if getattr(options, "validate_teacher", False) and distiller.teacher is not None:
            tracker.say(f"teacher: val mIoU {validate(tracker, distiller.teacher, 'teacher'):.2%}")

        while state.epoch <= options.num_epochs and state.step < total_steps:
            distiller.train()
            lr = float(schedule.get_last_lr()[0])
            for images, labels, _ in training_batches(
                train_set,
                batch_size=options.batch_size,
                seed=options.seed,
                epoch=state.epoch,
                start=state.batch,
                num_workers=options.num_workers,
            ):
                losses = distiller(
                    to_float(images.to(device, non_blocking=True)),
                    labels.to(device, non_blocking=True),
                )
                optimizer.zero_grad(set_to_none=True)
                torch.stack(list(losses.values())).sum().backward()
                optimizer.step()
                state.step += 1
                state.batch += 1
                tracker.update(losses, state.epoch, lr, len(images))
                if state.step >= total_steps:
                    break
                if time.monotonic() - saved > 60 * options.save_every:
                    save("last.pt")
            tracker.flush(state.epoch, lr)

            last = state.epoch == options.num_epochs or state.step >= total_steps
            due = last or state.epoch % options.validate_every == 0
            score = validate(tracker, distiller.student) if due else 0.0
            if state.batch == steps_per_epoch:
                schedule.step()
                state.epoch, state.batch = state.epoch + 1, 0
            if due:
                best = score > state.best
                state.best = max(score, state.best)
                tracker.say(
                    f"step {state.step}/{total_steps}: val mIoU {score:.2%}, best {state.best:.2%}"
                    + (" *" if best else "")
                )
                facts = {
                    "method": options.method,
                    "dataset": options.dataset,
                    "step": state.step,
                    "mean_iou": score,
                }
                save_model(distiller.student, run_dir / f"{options.network}.safetensors", **facts)
                save("last.pt")
                if best:
                    save_model(distiller.student, run_dir / f"{options.network}_best.safetensors", **facts)
                    save("best.pt")
        tracker.say(f"done: {run_dir / options.network}.safetensors and {options.network}_best.safetensors")


def recipe(distiller: Distiller, options: TrainingOptions) -> tuple[AdamW, PolynomialLR]:
    """AdamW on every parameter, and the learning rate that falls once an epoch.

    As published, epoch e uses lr·(1 − e/1500): the schedule makes its first step before the training does.
    """
    optimizer = AdamW(
        distiller.parameters(),
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )
    schedule = PolynomialLR(optimizer, total_iters=options.lr_decay_epochs, power=options.lr_power)
    optimizer.step()  # without gradients it changes nothing; it keeps PolynomialLR from warning about the order
    schedule.step()
    return optimizer, schedule


def open_run_dir(options: TrainingOptions, parameters: int) -> Path:
    """Make the run's folder and write options.json.

    Raises:
        UserError: it can't be written, or holds a run and `--resume` was not given.
    """
    run_dir = options.run_dir
    if not options.resume and (run_dir / "last.pt").exists():
        raise UserError(f"{run_dir} already holds a run; add --resume to go on with it, or choose another --output-dir")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not options.resume:
            (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        facts = options.as_json() | {"parameters": parameters}
        (run_dir / "options.json").write_text(json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"can't write to {run_dir} ({error.strerror}); choose another --output-dir") from error
    return run_dir


def save_checkpoint(
    path: Path,
    distiller: Distiller,
    optimizer: AdamW,
    schedule: PolynomialLR,
    state: State,
    options: TrainingOptions,
    device: torch.device,
) -> None:
    """Write everything that decides the run's future: aside first, then renamed over the old one."""
    content = {
        "model": distiller.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "state": vars(state),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "options": options.as_json(),
    }
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def restore(
    run_dir: Path,
    distiller: Distiller,
    optimizer: AdamW,
    schedule: PolynomialLR,
    device: torch.device,
) -> State:
    """Take everything up from the last checkpoint.

    Raises:
        UserError: there is none, it is damaged, or it belongs to another method.
    """
    path = run_dir / "last.pt"
    if not path.exists():
        raise UserError(f"no checkpoint at {path} to go on from; leave --resume out to start a run")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        distiller.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged or of another method or model ({reason})") from error
    schedule.load_state_dict(content["schedule"])
    torch.set_rng_state(content["random"].cpu())
    if content["random_cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(content["random_cuda"].cpu(), device)
    return State(**content["state"])
