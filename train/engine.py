"""The one training loop: distillation with any method, teachers and students alone.

A run is a folder: options.json, metrics.jsonl, last.pt and best.pt (everything that decides the run's future),
student.safetensors and student_best.safetensors (the bare network; with `--ema`, its averaged weights). Data order and
augmentation are functions of (seed, epoch, image), so a run goes on in mid-epoch from a step count and torch's random
state alone.
"""

import hashlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import AdamW

from datasets import SceneDataset, open_split
from datasets.classes import Classes
from datasets.loading import Batch, Batches, training_batches
from datasets.transforms import to_float
from errors import UserError
from eval.inference import evaluate
from models import SegmentationModel, save_model
from models.checkpoints import metadata_of, told_normalisation
from models.distillation import Distiller
from models.pyramid import settle
from train.distributed import Ranks, until_another_ends
from train.optimisation import AveragedWeights, Plan, Schedule, new_optimizer
from train.options import DistillationOptions, TrainingOptions
from train.run_folder import RunFolder, load_checkpoint, provenance
from train.tracking import NotFiniteError, Tracker

NODES_OWN = frozenset(
    [
        "datadir",
        "train_list",
        "teacher_weights",
        "student_weights",
        "output_dir",
        "cache",
        "num_workers",
        "device",
    ]
)
"""Options that may differ between processes: what is read there is compared, and the first process alone writes."""


@dataclass
class State:
    """Where a run stands."""

    epoch: int = 1  # the epoch under way, from 1
    batch: int = 0  # its steps that are done
    step: int = 0  # steps done in all
    best: float = -1.0  # best validation mIoU so far


class Setup(NamedTuple):
    """What a run needs before its networks are built."""

    ranks: Ranks
    folder: RunFolder | None  # rank 0's alone
    train_set: SceneDataset
    val_set: SceneDataset
    classes: Classes


@until_another_ends()
def start(options: TrainingOptions) -> Setup:
    """Claim the run's folder, open the data, and seed everything.

    Called before the networks are built, so that one seed gives every method the same student.

    Raises:
        UserError: weights that are missing, or a device, folder or data set that can't be used; nothing long has been
            started by then.
    """
    ranks = Ranks(options.device)
    with ranks.together():
        ranks.share(options.batch_size, options.accumulate)
        options.find_weights()
        prepare(ranks, options)
        folder = RunFolder(options) if ranks.first else None
        torch.manual_seed(options.seed)
        common: dict[str, Any] = {"height": options.height, "cache": options.cache}
        train_set = open_split(
            options.dataset,
            options.datadir,
            "train",
            every=options.subset_every,
            list_file=options.train_list,
            augment=options.augmentation,
            full_labels=options.loss_size == "full",
            **common,
        )
        val_set = open_split(options.dataset, options.datadir, "val", **common)
    return Setup(ranks, folder, train_set, val_set, train_set.classes)


@until_another_ends()
def train(distiller: Distiller, setup: Setup, options: TrainingOptions) -> None:
    """Train `distiller.student` and keep its last and best weights in the run's folder.

    Raises:
        UserError: `--resume` with options that would change the result, a loss that is not finite, or a full disk.
            What was saved before is still there.
    """
    run = Run(distiller, setup, options)
    with run.interrupt, run.tracker:
        run.go()
    del run.learner  # DistributedDataParallel, which must be gone by then
    setup.ranks.leave()
    if not run.done:
        sys.exit(128 + (run.interrupt.received or signal.SIGTERM))


class Run:
    """A run under way: the networks, the optimizer, how far it has come.

    Raises:
        UserError: the processes were not given the same, or `--resume` another run than it began.
    """

    def __init__(self, distiller: Distiller, setup: Setup, options: TrainingOptions) -> None:
        self.distiller, self.options = distiller, options
        self.ranks, self.folder, self.train_set, self.val_set, _ = setup
        self.device = self.ranks.device
        self.micro_batch = self.ranks.share(options.batch_size, options.accumulate)
        self.steps_per_epoch = math.ceil(len(self.batches(1)) / options.accumulate)
        plan = Plan.of(options, len(self.train_set), self.steps_per_epoch)
        if isinstance(options, DistillationOptions) and options.logits_weight:
            distiller.distil_logits(options.logits_weight, options.logits_temperature)
        self._compare(plan)
        if self.ranks.first and options.batch_size > len(self.train_set):
            print(
                f"warning: there are {len(self.train_set)} training images, fewer than --batch-size "
                f"{options.batch_size}: each step takes them all",
                file=sys.stderr,
            )
        alone = self.micro_batch == 1 < options.batch_size and not options.sync_batchnorm
        if self.ranks.first and alone and distiller.fusion is not None:
            print(
                "warning: one image at a time a process: CSF then takes its squeeze for single images, and "
                "BatchNorm sees one image; a larger --batch-size comes closer to the recipe",
                file=sys.stderr,
            )

        distiller.to(self.device)
        if options.sync_batchnorm and self.ranks.world_size > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(distiller)
        self.class_weights = (
            distiller.class_weights.cpu()
        )  # once: a step must not wait for the device
        self.optimizer = new_optimizer(distiller, options)
        self.averaged = AveragedWeights(distiller.student, options.ema) if options.ema else None
        self.network = (
            self.averaged.network if self.averaged else distiller.student
        )  # what is validated and kept
        torch.manual_seed(
            options.seed + self.ranks.rank
        )  # building modules drew numbers; dropout's are the same
        self.state = State()
        if options.resume:
            self.state = restore(options, self.ranks, distiller, self.optimizer, self.averaged)
        if (
            self.folder is not None
        ):  # after the checkpoint fitted: what is refused must not be noted as the run's
            self.folder.describe()
        self.schedule = Schedule(self.optimizer, options, plan)
        self.total_steps = plan.total_steps(self.state.epoch, self.state.batch, self.state.step)
        if options.compile:
            # an epoch's odd last batch is compiled too, instead of slowing all others
            distiller.compile(dynamic=False, mode=options.compile_mode)
        more_than_a_student = len(list(distiller.parameters())) > len(
            list(distiller.student.parameters())
        )
        self.learner = self.ranks.wrap(distiller, some_idle=more_than_a_student)
        self.interrupt = Interrupt()
        self.tracker = Tracker(options, self.ranks, self.total_steps, self.state.step, self.device)

    def _compare(self, plan: Plan) -> None:
        """Refuse processes, or a run that is taken up, that were given something else."""
        options, distiller = self.options, self.distiller
        facts = {
            "parameters": sum(p.numel() for p in distiller.student.parameters()),
            "data": self.train_set.identity(),
            "teacher": distiller.teacher and fingerprint(distiller.teacher),
            "world_size": self.ranks.world_size,
            **({"decay_steps": plan.steps} if options.schedule == "step" else {}),
        }
        chosen = {key: value for key, value in options.as_json().items() if key not in NODES_OWN}
        also = {
            "validation data": self.val_set.identity(),
            "normalisation": distiller.student.normalisation,
            "device": self.device.type,
        }
        self.ranks.require_same(chosen | facts | also)
        with self.ranks.together():
            if self.folder is not None:
                self.folder.compare(options, **facts)

    @property
    def done(self) -> bool:
        return self.state.step >= self.total_steps

    def go(self) -> None:
        """Train to the last step, or until a signal comes, and save.

        Raises:
            UserError: a loss is not finite, or what is written doesn't fit on the disk.
        """
        options, state, tracker = self.options, self.state, self.tracker
        tracker.record(
            "start", state.epoch, total_steps=self.total_steps, **provenance(self.device)
        )
        tracker.say(
            f"{options.method}: {len(self.train_set)} training and {len(self.val_set)} validation images, "
            f"{self.steps_per_epoch} steps an epoch, {self.total_steps} in all, on {self.device}, in {options.run_dir}"
        )
        if self.done:
            tracker.say(
                f"{state.step} steps are done already; to train on, raise --num-epochs or --max-steps"
            )
        if (
            isinstance(options, DistillationOptions)
            and options.validate_teacher
            and self.distiller.teacher is not None
        ):
            tracker.say(f"teacher: val mIoU {self.validate(self.distiller.teacher, 'teacher'):.2%}")
        if self.distiller.teacher is not None:
            settle(self.distiller.teacher, bf16=options.precision == "bf16")
        self.saved = time.monotonic()
        try:
            while not self.done:
                self.train_epoch()
                if self.ranks.any(self.interrupt.received is not None) and not self.done:
                    break
                self.end_epoch()
        except NotFiniteError as error:
            names = ", ".join(self.train_set.samples[i].name for i in error.indices)
            raise UserError(
                f"the loss {error.term} is {error.value} at step {error.step} (images {names}); the last good state "
                f"is kept in {options.run_dir}: look at these images, or try a lower --lr"
            ) from error
        if self.done:
            tracker.say(
                f"done: {options.run_dir / options.network}.safetensors and {options.network}_best.safetensors"
            )
        else:
            self.save()
            tracker.say(
                f"interrupted at step {state.step}; the same command with --resume goes on from there"
            )

    def train_epoch(self) -> None:
        """Take the steps that are left of the epoch and of the run, or those before a signal."""
        self.distiller.train()
        for group in grouped(
            self.batches(self.state.epoch, self.state.batch), self.options.accumulate
        ):
            self.step(group)
            if self.done:
                break
            late = time.monotonic() - self.saved > 60 * self.options.save_every
            if self.ranks.any(late or self.interrupt.received is not None):
                if self.ranks.any(self.interrupt.received is not None):
                    break
                self.look()
                self.save()
        self.look()

    def look(self) -> None:
        """Log the losses, and go no further, neither validating nor saving, with weights that a step has spoilt.

        Raises:
            NotFiniteError: a loss is not finite.
            UserError: weights are not finite, which no loss has shown yet.
        """
        self.tracker.flush(self.state.epoch, self.schedule.lr)
        if not torch.stack(
            [value.isfinite().all() for value in self.distiller.state_dict().values()]
        ).all():
            raise UserError(
                f"step {self.state.step} made weights NaN or infinite, by gradients as large; what was saved before is "
                f"kept in {self.options.run_dir}: look for images of a single colour, or try a lower --lr"
            )

    def step(self, group: list[Batch]) -> None:
        """One step of the optimizer, by a global batch in parts whose gradients add up."""
        state, ranks = self.state, self.ranks
        self.schedule.set(state.epoch, state.step)
        self.optimizer.zero_grad(set_to_none=True)
        for batch, share in zip(group, shares(group, self.class_weights, ranks), strict=True):
            with ranks.averaging(self.learner, batch is group[-1]):
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"
                ):
                    losses = self.learner(*to_device(batch, self.device))
                if share is not None:
                    losses = {
                        name: share[int(name != "ce")] * loss for name, loss in losses.items()
                    }
                total = torch.stack(list(losses.values())).sum() / len(group)
                total.backward()
            self.tracker.add(losses, batch.indices)
        self.optimizer.step()
        state.step += 1
        state.batch += 1
        if self.averaged is not None:
            self.averaged.update(state.step)
        self.tracker.stepped(state.epoch, self.schedule.lr)

    def end_epoch(self) -> None:
        """Count the epoch if it is over; validate, keep the network and save if that is due."""
        state, tracker = self.state, self.tracker
        over = state.batch >= self.steps_per_epoch
        due = self.done or (over and state.epoch % self.options.validate_every == 0)
        score = self.validate(self.network) if due else 0.0
        if over:
            state.epoch, state.batch = state.epoch + 1, 0
        if not due:
            return
        best = score > state.best
        state.best = max(score, state.best)
        mark = " *" if best else ""
        tracker.say(
            f"step {state.step}/{self.total_steps}: val mIoU {score:.2%}, best {state.best:.2%}{mark}"
        )
        tracker.pictures(self.network, self.val_set)
        self.keep_network("", score)
        if best:  # before last.pt, which remembers that this was the best
            self.keep_network("_best", score)
            self.save(best=True)
        self.save()

    def validate(self, model: nn.Module, event: str = "val") -> float:
        """mIoU of the validation split."""
        self.ranks.agree(model)
        scores = evaluate(
            model,
            self.val_set,
            batch_size=self.micro_batch,
            num_workers=self.options.num_workers,
            device=self.device,
            progress=False,
        ).as_json()
        self.tracker.validated(self.state.epoch, scores, event)
        return scores["mean_iou"] or 0.0

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint."""
        cuda = self.device.type == "cuda"
        random = self.ranks.gather(
            [torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None]
        )
        if self.folder is not None:
            content = {
                "model": self.distiller.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "state": vars(self.state),
                "random": random,
                "metadata": metadata_of(
                    self.distiller.student, **self.facts(self.state.best if best else None)
                ),
            }
            if self.averaged is not None:
                content["averaged"] = self.averaged.network.state_dict()
            self.folder.save(content, best=best)
        self.saved = time.monotonic()

    def keep_network(self, suffix: str, score: float) -> None:
        """Write the network's weights alone."""
        if self.folder is not None:
            path = self.folder.path / f"{self.options.network}{suffix}.safetensors"
            save_model(self.network, path, **self.facts(score))

    def facts(self, score: float | None) -> dict[str, Any]:
        """What weights tell about where they come from."""
        told = {name: getattr(self.options, name) for name in ("method", "dataset", "height")}
        return told | {"step": self.state.step} | ({} if score is None else {"mean_iou": score})

    def batches(self, epoch: int, steps_done: int = 0) -> Batches:
        """What is left of an epoch."""
        return training_batches(
            self.train_set,
            batch_size=self.micro_batch,
            seed=self.options.seed,
            epoch=epoch,
            start=steps_done * self.options.accumulate,
            num_workers=self.options.num_workers,
            pin_memory=self.device.type == "cuda",
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as float32 in [0, 1] and labels; bytes travel, floats are made on the device."""
    return to_float(batch.images.to(device, non_blocking=True)), batch.labels.to(
        device, non_blocking=True
    )


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches; the last may be shorter."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def shares(
    group: list[Batch], weights: torch.Tensor, ranks: Ranks
) -> Iterable[torch.Tensor | None]:
    """How much each part of a global batch counts, (2,): first for cross entropy, then for all other losses.

    Losses are averaged over parts and ranks. But a part may hold fewer images than the others, and cross entropy is an
    average over pixels weighted by their class. Multiplied by these, the averages are those of the whole batch.
    None for a batch in one part, which counts as it is. `weights` are the classes', on the host like the labels.
    """
    if len(group) == ranks.world_size == 1:
        return [None]
    counted = [
        torch.bincount(batch.labels.flatten(), minlength=len(weights)).double() @ weights.double()
        for batch in group
    ]
    own = torch.tensor(
        [(float(c), len(batch.images)) for c, batch in zip(counted, group, strict=True)]
    )
    own = own.to(ranks.device, non_blocking=True)  # else the host would wait for the step before
    return own / ranks.mean(own.mean(0)).clamp_min(torch.finfo(own.dtype).tiny)


def prepare(ranks: Ranks, options: TrainingOptions) -> None:
    """Set torch up for speed, or for bits that repeat."""
    if options.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # else its products add up in any order
    cuda = ranks.device.type == "cuda"
    if options.precision == "bf16" and not cuda and ranks.first:
        print(
            "warning: on a CPU without AVX512-BF16 or AMX, bf16 is far slower than fp32",
            file=sys.stderr,
        )
    if options.sync_batchnorm and not cuda:
        raise UserError("--sync-batchnorm works on CUDA alone; leave it out")
    if options.compile_mode != "default" and ranks.world_size > 1:
        raise UserError(
            f"--compile-mode {options.compile_mode} is for one process; with several take --compile without it"
        )
    if options.compile and ranks.world_size > 1:
        # One graph, not one for each bucket of gradients: 15 MB are too few to be worth sending early, and the parts'
        # backward passes have failed for an epoch's smaller last batch.
        torch._dynamo.config.optimize_ddp = False
    torch.set_float32_matmul_precision("high" if options.tf32 and cuda else "highest")
    torch.backends.cudnn.allow_tf32 = options.tf32
    torch.backends.cudnn.benchmark = not options.deterministic
    torch.use_deterministic_algorithms(options.deterministic, warn_only=True)
    if (
        options.deterministic and cuda
    ):  # which leaves attention's fast kernels alone, and they add up in any order
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)


def fingerprint(model: SegmentationModel) -> str:
    """Hash of a network's weights, and of what it does to its input."""
    digest = hashlib.sha256(repr(model.normalisation).encode() if model.normalisation else b"")
    for value in model.state_dict().values():
        digest.update(
            value.detach().cpu().flatten().view(torch.uint8).numpy()
        )  # as bytes: numpy has no bfloat16
    return digest.hexdigest()[:20]


def restore(
    options: TrainingOptions,
    ranks: Ranks,
    distiller: Distiller,
    optimizer: AdamW,
    averaged: AveragedWeights | None = None,
) -> State:
    """Take everything up from the last checkpoint; the optimizer's numbers are those of the options.

    Raises:
        UserError: there is none, or it belongs to another method, model, `--decay` or number of processes.
    """
    with ranks.together():
        content = load_checkpoint(options.run_dir) if ranks.first else None
    content = ranks.of_first(content)  # nodes need not see each other's disks
    if len(content["optimizer"]["param_groups"]) != len(optimizer.param_groups):
        raise UserError(
            f"--decay can't change on --resume; give that of the run in {options.run_dir}"
        )
    numbers = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    try:
        distiller.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        if averaged is not None:
            averaged.network.load_state_dict(
                content.get("averaged", distiller.student.state_dict())
            )
        state = State(**content["state"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the checkpoint in {options.run_dir} is of another method or model ({reason})"
        ) from error
    if len(content["random"]) != ranks.world_size:
        raise UserError(
            f"{options.run_dir} was trained by {len(content['random'])} processes; go on with as many"
        )
    for group, chosen in zip(optimizer.param_groups, numbers, strict=True):
        group.update(chosen)
    if normalisation := told_normalisation(options.run_dir, content.get("metadata", {})):
        for network in [distiller.student] + ([averaged.network] if averaged else []):
            network.normalisation = normalisation
    random, random_cuda = content["random"][ranks.rank]
    torch.set_rng_state(random)
    if random_cuda is not None and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(random_cuda)
    return state


class Interrupt:
    """Within it SIGINT and SIGTERM are remembered, so that the step is finished and saved; a second one acts."""

    received: int | None = None

    def __enter__(self) -> "Interrupt":
        self.before = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self.before[signal.Signals(number)])
