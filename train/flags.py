"""Every number of a run as a typed flag, in groups, with the published value as default.

Liu et al., arXiv 2202.13393, section IV-B. `free` marks what a resumed run may change, because it
does not change what is computed; `local` what may also differ between the processes of a run.
`least` and `below` bound a value; without them it is at least 0.
"""

import math
import os
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from datasets import DATASETS
from models.distillation.methods import LossOptions
from models.factory import MODELS
from models.pyramid import MIN_HEIGHT


def number(default: Any, *, least: float = 0, below: float = math.inf, **metadata: Any) -> Any:
    """A field whose value, or each of whose values, is at least `least` and less than `below`."""
    return field(default=default, metadata={"least": least, "below": below, **metadata})


def free(default: Any, *, least: float = 0) -> Any:
    """A field that a resumed run may change."""
    return number(default, least=least, free=True)


def local(default: Any = MISSING, *, default_factory: Any = MISSING) -> Any:
    """A field that a resumed run may change, and that may differ between its processes.

    Where it names data or a teacher, what they hold is compared instead.
    """
    metadata = {"free": True, "local": True}
    return field(default=default, default_factory=default_factory, metadata=metadata)


def default_workers() -> int:
    """Four, or as many as there are cores for this process."""
    available = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return min(4, len(available(0)))


Model = Annotated[Literal[MODELS], tyro.conf.arg(metavar="MODEL")]  # type: ignore[valid-type]
"""A name in models/factory.py; the help has no room for all of them."""

Resume = Annotated[tuple[Literal["auto"], ...] | None, tyro.conf.arg(metavar="[auto]")]
"""`--resume` is (), `--resume auto` is ("auto",), and without the flag it is None."""


@dataclass(kw_only=True)
class DataOptions:
    dataset: Literal[DATASETS] = "cityscapes"  # type: ignore[valid-type]
    """Data set: which folders and names to look for below --datadir."""
    datadir: Path = local()
    """Root of the data set, the folder that holds leftImg8bit/ and gtFine/ (Cityscapes), rgb_anon/
    and gt/ (ACDC), images/ and labels40/ (NYUv2), JPEGImages/ and SegmentationClassAugRaw/
    (VOC2012), or images/10k/ and labels/ (BDD100K)."""
    height: int = number(512, least=MIN_HEIGHT)
    """Images are resized so that their shorter side has this many pixels."""
    subset_every: int = number(1, least=1)
    """Train on every N-th image of the sorted training split."""
    train_list: Path | None = local(None)
    """Train on the images that this text file names, one a line."""
    cache: bool = local(True)
    """Keep the resized images in a memory-mapped cache: the same numbers, without decoding."""
    num_workers: int = local(default_factory=default_workers)
    """Processes that prepare batches; 0 prepares them in this one. Validation reads by as many
    threads."""


@dataclass(kw_only=True)
class RecipeOptions:
    recipe: Literal["paper", "modern"] = "paper"
    """Whose numbers are the flags' defaults: the paper's, or current practice (RECIPES in
    train/options.py)."""
    num_epochs: int = free(1000, least=1)
    """Passes over the training images."""
    batch_size: int = number(2, least=1)
    """Images a step, over all processes. A larger batch at the same number of epochs means fewer
    steps; a reader of the original trained at 10 instead of 2 and got 62.1 instead of 68.6."""
    keep_steps: bool = False
    """Repeat epochs until as many steps are done as at this script's published batch."""
    max_steps: int | None = free(None, least=1)
    """Stop after this many steps in all (validating and saving as at an epoch's end)."""
    lr: float = number(6e-5, least=1e-12)
    """Learning rate of AdamW."""
    betas: tuple[float, float] = number((0.9, 0.999), below=1)
    """Decay rates of AdamW's moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    decay: Literal["all", "matrices"] = "all"
    """Parameters with weight decay: every one, or all but norms and biases."""
    clip_grad: float | None = number(None, least=1e-12)
    """Clip the norm of all gradients to this."""
    schedule: Literal["epoch", "step"] = "epoch"
    """The learning rate falls once an epoch towards --lr-decay-epochs, or once a step and is 0
    after the last."""
    lr_decay_epochs: int = number(1500, least=1)
    """With --schedule epoch: where the learning rate would be 0."""
    lr_power: float = 1.0
    """Power of the polynomial decay."""
    warmup_steps: int = 0
    """The learning rate rises linearly over the first N steps."""
    loss_size: Literal["quarter", "full"] = "quarter"
    """Cross entropy on labels of a quarter of the image's size, or on whole ones, with upsampled
    logits."""
    class_weights: Literal["published", "none", "dataset"] = "published"
    """Of the cross entropy: the published ones (Cityscapes' classes; others have none), none, or
    1 / ln(1.1 + share of pixels), the published rule, counted on the training split."""
    normalisation: Literal["none", "imagenet", "auto"] = "none"
    """Normalise the input by ImageNet's mean and deviation; auto does where an ImageNet encoder is
    started from. With none and auto, a whole network that is started from keeps its own."""
    drop_path_rate: float = number(0.1, below=1)
    """Stochastic depth of the last block of the network that learns; rises linearly from 0."""
    dropout: float = number(0.1, below=1)
    """Dropout of whole channels ahead of its classifier."""
    flip: bool = True
    """Flip images from left to right, half of the time."""
    shift: int = 2
    """Translate by up to this many label pixels (four image pixels each) in x and y."""
    published_shift: bool = False
    """Translate image and label by the same number of pixels, misaligned, as published."""
    scale: tuple[float, float] = number((1.0, 1.0), least=1e-3)
    """Scale by a random factor from MIN to MAX."""
    crop: tuple[int, int] | None = number(None, least=MIN_HEIGHT)
    """HEIGHT WIDTH of a random crop, padded by black where needed. Default: the image's size."""
    seed: int = number(0, below=2**32)
    """Seed of initialisation, data order, augmentation and dropout."""


@dataclass(kw_only=True)
class RunOptions:
    output_dir: Path | None = local(None)
    """The run's folder. Default: outputs/METHOD_DATASET in the repository."""
    resume: Resume = free(None)
    """Continue from the run's last checkpoint; `--resume auto` starts a run if there is none."""
    override: bool = free(False)
    """With --resume: insist on options that change what the run computes."""
    validate_every: int = free(1, least=1)
    """Validate, and write a checkpoint, every N epochs."""
    validate_teacher: bool = free(False)
    """Measure the teacher on the validation split first."""
    iou_train: bool = free(False)
    """Measure the mIoU of the training images too, whenever the validation images are measured."""
    save_every: float = free(30.0)
    """Write a checkpoint also after this many minutes within an epoch."""
    epochs_save: int = free(0)
    """Keep the weights of every N-th epoch, under its number. 0: the last and the best alone."""
    steps_loss: int = free(50, least=1)
    """Log the losses every N steps."""
    tensorboard: bool = free(True)
    """Write TensorBoard event files into the run's folder."""
    visualize: bool = free(False)
    """Show losses, val mIoU and pictures live in visdom."""
    port: int = free(8097)
    """Port of the visdom server on this machine."""
    wandb: str | None = free(None)
    """Send the curves to this project of Weights & Biases."""


@dataclass(kw_only=True)
class HardwareOptions:
    device: str = local("auto")
    """cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run the networks in 16 bits where that is safe; losses stay in float32. bf16 is
    for GPUs from Ampere on, fp16, with a gradient scaler, for those before."""
    tf32: bool = True
    """On GPUs, let float32 matrix products use TF32."""
    compile: bool = False
    """Compile the training step, once for every size of a batch: where images differ, crop."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """torch.compile's mode. The other two replay the step as CUDA graphs: for small batches, which
    a GPU computes faster than Python launches their kernels."""
    accumulate: int = number(1, least=1)
    """Split each batch into this many parts whose gradients add up, to save memory."""
    sync_batchnorm: bool = False
    """Compute BatchNorm over all processes (CUDA)."""
    deterministic: bool = False
    """Use deterministic algorithms where torch has them (on a CPU it always does)."""


@dataclass(kw_only=True)
class StudentOptions:
    student_model: Model = "segformer_b0"
    """Architecture of the student: segformer_b0 … b5, pvt_v2_b0 … b5, or lvt."""
    student_weights: Path | None = local(None)
    """Start the student from these weights (an ImageNet encoder or a whole network; a file, or a
    name of the Hugging Face hub such as nvidia/mit-b0) instead of from scratch."""
    student_pretrained: bool = False
    """Start the student from its ImageNet encoder in ckpt_pretrained/."""


@dataclass(kw_only=True)
class DistillationOptions(LossOptions):
    teacher_model: Annotated[Model | None, tyro.conf.arg(metavar="{None}|MODEL")] = None
    """Architecture of the teacher. Default: that of its weights."""
    teacher_weights: Path | None = local(None)
    """A trained teacher: a file, or a name of the Hugging Face hub. Default: what train/teacher.py
    wrote for this data set, or the published file in outputs/."""
