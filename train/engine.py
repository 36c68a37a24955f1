"""The one training loop: distillation with any method, teachers and students alone.

    run = start(options)
    train(distiller, run, teacher)

Data order and augmentation are functions of (seed, epoch, image), so a run is resumed in mid-epoch
from a step count and torch's random state alone, and ends with the bits of an uninterrupted run.
"""

import math
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets.loading import Batch
from datasets.transforms import to_float
from errors import UserError
from eval.inference import evaluate
from eval.rendering import colorize
from models import SegmentationModel
from models.distillation import Distiller
from train import distributed
from train.checkpoint import State, begin, provenance, save, save_weights
from train.logger import Logger
from train.optimisation import Plan, new_optimizer
from train.setup import Run

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""After these a run saves and ends; schedulers of clusters send one of the last two."""
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(distiller: Distiller, run: Run, teacher: SegmentationModel | None = None) -> None:
    """Train `distiller.student` and keep its last and best weights in the run's folder.

    Args:
        teacher: frozen, in eval mode; it is neither trained nor saved.

    Raises UserError for `--resume` with something that would change the result, a loss that is
    not finite, or a full disk. What was saved before is still there.
    """
    options, device = run.options, run.device
    recipe, accumulate = options.recipe, options.hardware.accumulate
    steps_per_epoch = math.ceil(run.batches_per_epoch / accumulate)
    plan = Plan(recipe, options.published_batch_size, len(run.train_set), steps_per_epoch)

    distiller.to(device)
    if teacher is not None:
        # Its convolutions in the order of their inputs, once instead of at every step.
        teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.hardware.sync_batchnorm and dist.is_initialized():
        nn.SyncBatchNorm.convert_sync_batchnorm(distiller)
    class_weights = distiller.class_weights.cpu()  # once: a step must not wait for the device
    optimizer = new_optimizer(distiller, recipe)
    precision = PRECISIONS.get(options.hardware.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=options.hardware.precision == "fp16")
    # Building the modules drew random numbers; dropout's are the same for all methods.
    torch.manual_seed(recipe.seed + distributed.rank())
    state = begin(run, distiller, teacher, plan, optimizer, scaler)
    run.use_cache()  # the first thing that takes long: what can be refused was, by now
    # As planned, unless a resumed run goes on with another batch size or number of epochs.
    total_steps = plan.steps = plan.total_steps(state.epoch, state.batch, state.step)
    learner = compile_and_wrap(distiller, teacher, run)
    logger = Logger(options, run.train_set.samples, total_steps, state.step)
    logger.record("start", state.epoch, total_steps=total_steps, **provenance(device))
    names = distiller.student.name + ("" if teacher is None else f" taught by {teacher.name}")
    logger.say(
        f"{options.method}: {names}, {len(run.train_set)} training and {len(run.val_set)} "
        f"validation images, {total_steps} steps, {steps_per_epoch} an epoch, on {device}, in "
        f"{options.run_dir}"
    )
    if options.run.validate_teacher and teacher is not None:
        # What distils features may have other classes, but not what is scored.
        run.classes.order("the teacher", teacher.num_classes, teacher.class_names)
        logger.say(
            f"teacher: val mIoU {validate(teacher, run, state.epoch, logger, 'teacher'):.2%}"
        )
    saved = time.monotonic()

    signals = remember_signals()
    epochs = run.epochs(state.epoch, state.batch)
    while state.step < total_steps and not distributed.any_process(bool(signals)):
        distiller.train()
        for group in grouped(next(epochs), accumulate):
            lr = plan.learning_rate(state.epoch, state.step)
            for parameters in optimizer.param_groups:
                parameters["lr"] = lr
            optimizer.zero_grad(set_to_none=True)

            # One step by a global batch, in parts whose gradients add up.
            scales = loss_scales(group, class_weights, device)
            for batch, (ce, others) in zip(group, scales, strict=True):
                images, labels = to_device(batch, device)
                if options.hardware.compile_mode != "default":
                    # Teacher and distiller are two CUDA graphs of one step. Else the second would
                    # free the first one's outputs, which are its inputs.
                    torch.compiler.cudagraph_mark_step_begin()
                # The last part's backward pass averages gradients; those before add up.
                if isinstance(learner, DistributedDataParallel):
                    learner.require_backward_grad_sync = batch is group[-1]
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    teacher_output = None
                    if teacher is not None:
                        with torch.no_grad():
                            with_logits = distiller.needs_teacher_logits
                            teacher_output = teacher(images, logits=with_logits)
                    losses = learner(images, labels, teacher_output)
                losses = {k: (ce if k == "ce" else others) * v for k, v in losses.items()}
                total = torch.stack(list(losses.values())).sum() / len(group)
                scaler.scale(total).backward()
                logger.add(state.step + 1, losses, batch.indices)

            if recipe.clip_grad is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(distiller.parameters(), recipe.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            state.step += 1
            state.batch += 1
            logger.stepped(state.step, state.epoch, lr)

            # What one process decides by its clock or a signal, all do after the same step.
            late = time.monotonic() - saved > 60 * options.run.save_every
            if state.step >= total_steps or distributed.any_process(bool(signals)):
                break
            if distributed.any_process(late):
                log_and_check(distiller, run, state, logger)
                save(run, distiller, optimizer, scaler, state)
                saved = time.monotonic()

        # The epoch is over, or the run, or a signal came.
        log_and_check(distiller, run, state, logger)
        if state.step < total_steps and distributed.any_process(bool(signals)):
            break
        epoch = state.epoch  # the one that was under way
        if state.batch >= steps_per_epoch:
            state.epoch, state.batch = epoch + 1, 0
        numbered = options.run.epochs_save > 0 and epoch % options.run.epochs_save == 0
        if state.step < total_steps and epoch % options.run.validate_every != 0 and not numbered:
            continue
        score = validate(distiller.student, run, epoch, logger, "val", distiller.class_weights)
        best = score > state.best
        state.best = max(score, state.best)
        logger.say(
            f"step {state.step}/{total_steps}: val mIoU {score:.2%}, best {state.best:.2%}"
            + (" *" if best else "")
        )
        save_weights(run, distiller.student, state, score)
        if numbered:
            save_weights(run, distiller.student, state, score, f"_epoch{epoch:04}")
        if best:  # ahead of last.pt, which remembers that this was the best
            save_weights(run, distiller.student, state, score, "_best")
        save(run, distiller, optimizer, scaler, state)
        saved = time.monotonic()

    del epochs  # and the workers that read them
    done = state.step >= total_steps
    if not done:
        save(run, distiller, optimizer, scaler, state)
        logger.say(f"interrupted at step {state.step}; the same command with --resume continues")
    else:
        logger.say(f"done: {options.run_dir / options.network}_best.safetensors, and the last")
    logger.close()
    del learner  # DistributedDataParallel, which must be gone when the group is shut down
    distributed.shutdown()
    if not done:
        # Without a signal here, another process had one.
        sys.exit(128 + (signals[0] if signals else signal.SIGTERM))


# ------------------------------------------------------------------------------ parts of a step


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images as float32 in [0, 1] and labels; bytes travel, floats are made on the device."""
    images = batch.images.to(device, non_blocking=True)
    return to_float(images), batch.labels.to(device, non_blocking=True)


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches; the last may be shorter."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def loss_scales(group: list[Batch], class_weights: Tensor, device: torch.device) -> Tensor:
    """How much each part of a global batch counts: (parts, 2), for cross entropy and all others.

    Losses are averaged over parts and processes. But a part may hold fewer images than the others,
    and cross entropy is an average over pixels weighted by their class. Multiplied by these, the
    averages are those of the whole batch. A batch in one part counts as it is.
    `class_weights` are on the host, like the labels.
    """
    if len(group) == distributed.world_size() == 1:
        return torch.ones(1, 2)
    counts = []
    for batch in group:
        pixels = torch.bincount(batch.labels.flatten(), minlength=len(class_weights)).double()
        counts.append((float(pixels @ class_weights.double()), float(len(batch.images))))
    own = torch.tensor(counts).to(device, non_blocking=True)
    return own / distributed.mean(own.mean(0)).clamp_min(torch.finfo(own.dtype).tiny)


def compile_and_wrap(distiller: Distiller, teacher: nn.Module | None, run: Run) -> nn.Module:
    """What the loop calls: the distiller, compiled and averaged over processes as asked."""
    hardware = run.options.hardware
    if hardware.compile:
        # One graph a size: an epoch's odd last batch must not slow down all others.
        for module in (distiller, teacher):
            if module is not None:
                module.compile(dynamic=False, mode=hardware.compile_mode)
    if not dist.is_initialized():
        return distiller
    # Depthwise weights get channels_last gradients, which are copied: a note about speed alone.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # What is learned beside a student may be unused in a step: CSF has two squeezes, and uses one.
    others = [name for name, _ in distiller.named_parameters() if not name.startswith("student.")]
    return DistributedDataParallel(
        distiller,
        device_ids=[run.device.index] if run.is_cuda else None,
        find_unused_parameters=bool(others),
        broadcast_buffers=False,  # BatchNorm's statistics are not read in training, see `validate`
    )


def remember_signals() -> list[int]:
    """A list of the signals that come: the run saves, then ends. A second one ends it at once."""
    received: list[int] = []

    def remember(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in SIGNALS:
        signal.signal(number, remember)
    return received


# ------------------------------------------------------------------------------ validating


def validate(
    model: SegmentationModel,
    run: Run,
    epoch: int,
    logger: Logger,
    event: str,
    class_weights: Tensor | None = None,
) -> float:
    """Score a network on the validation split and log the scores; returns its mIoU.

    Dashboards also get the student's prediction for the first image.
    """
    distributed.broadcast_buffers(model)
    common: dict[str, Any] = {"batch_size": run.micro_batch_size, "device": run.device}
    common |= {"num_workers": run.options.data.num_workers, "progress": False}
    scores = evaluate(model, run.val_set, class_weights=class_weights, **common).as_json()
    if event == "val" and run.options.run.iou_train:
        scores["train_iou"] = evaluate(model, run.train_set.plain(), **common).as_json()["mean_iou"]
    logger.validated(epoch, scores, event)
    if event == "val" and logger.dashboards:
        item = run.val_set[0]
        with torch.inference_mode():
            logits = model.eval()(to_float(item.image[None].to(run.device))).logits[0]
        prediction = logits.argmax(0).cpu().numpy()
        logger.pictures(
            {
                "input": item.image.permute(1, 2, 0).numpy(),
                "prediction": np.asarray(colorize(prediction, run.classes)),
                "target": np.asarray(colorize(item.label.numpy(), run.classes)),
            }
        )
    return scores["mean_iou"]


def log_and_check(distiller: Distiller, run: Run, state: State, logger: Logger) -> None:
    """Log the losses, and check the weights before they are validated or saved.

    Raises UserError if a loss or a weight is not finite.
    """
    logger.log_losses()
    finite = [value.isfinite().all() for value in distiller.state_dict().values()]
    if not torch.stack(finite).all():
        raise UserError(
            f"step {state.step} made weights NaN or infinite, by gradients as large; the last good "
            f"state is kept in {run.options.run_dir}: look for images of a single colour, or try "
            "a lower --lr"
        )
