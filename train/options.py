"""Every number of a run as a typed flag, with the published value as default.

Liu et al., arXiv 2202.13393, section IV-B. The options are saved as options.json in the run's folder.
"""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import tyro

from cli import MANY
from datasets import DATASETS, Augmentation, Classes
from errors import UserError
from models import SegmentationModel, create_model, load_backbone, load_model
from models.checkpoints import IMAGENET
from models.distillation.losses import FEATURE_LOSSES
from models.factory import MODELS
from models.pyramid import MIN_HEIGHT
from train.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]


@dataclass(kw_only=True)
class TrainingOptions:
    """Flags of every training script."""

    method: ClassVar[str]
    """Name of the method; the run's folder is called after it."""
    network: ClassVar[str] = "student"
    """What the network that learns is called; its weights are written as NETWORK.safetensors."""

    recipe: Literal[tuple(RECIPES)] = "paper"  # type: ignore[valid-type]
    """Whose numbers are the flags' defaults: the paper's, or today's habits (--recipe modern --help shows them)."""

    dataset: Literal[DATASETS] = "cityscapes"  # type: ignore[valid-type]
    """Data set: which folders and names to look for below --datadir."""
    datadir: Path
    """Root of the data set, the folder that holds leftImg8bit/ and gtFine/ (Cityscapes), rgb_anon/ and gt/ (ACDC),
    images/ and labels40/ (NYUv2), or JPEGImages/ and SegmentationClassAugRaw/ (VOC2012)."""
    height: int = 512
    """Images are resized so that their shorter side has this many pixels."""
    subset_every: int = 1
    """Train on every N-th image of the sorted training split."""
    train_list: Path | None = None
    """Train on the images that this text file names, one a line."""
    cache: bool = True
    """Keep the resized images in a memory-mapped cache: the same numbers, without decoding."""
    num_workers: int = 4
    """Processes that prepare batches; 0 prepares them in this one."""

    num_epochs: int = 1000
    """Passes over the training images."""
    batch_size: int = 2
    """Images a step, over all processes. A larger batch at the same number of epochs means fewer steps; a reader of
    the original trained at 10 instead of 2 and got 62.1 instead of 68.6."""
    keep_steps: bool = False
    """Repeat epochs until as many steps are done as at this script's published batch."""
    max_steps: int | None = None
    """Stop after this many steps in all (validating and saving as at an epoch's end)."""
    lr: float = 6e-5
    """Learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    decay: Literal["all", "matrices"] = "all"
    """Parameters with weight decay: every one, or all but norms and biases."""
    schedule: Literal["epoch", "step"] = "epoch"
    """The learning rate falls once an epoch towards --lr-decay-epochs, or once a step and is 0 after the last."""
    lr_decay_epochs: int = 1500
    """With --schedule epoch: where the learning rate would be 0."""
    lr_power: float = 1.0
    """Power of the polynomial decay."""
    warmup_steps: int = 0
    """The learning rate rises linearly over the first N steps."""
    ema: float = 0.0
    """Decay of an exponential moving average of the network's weights, which is then validated and written as
    NETWORK.safetensors; 0 averages nothing."""
    loss_size: Literal["quarter", "full"] = "quarter"
    """Cross entropy on labels of a quarter of the image's size, or on whole ones, with upsampled logits."""
    normalisation: Literal["none", "imagenet", "auto"] = "none"
    """Normalise the input by ImageNet's mean and deviation; auto does where an ImageNet encoder is started from. With
    none and auto, a whole network that is started from keeps its own."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last block of the network that learns; rises linearly from 0."""
    dropout: float = 0.1
    """Dropout of whole channels ahead of its classifier."""
    flip: bool = True
    """Flip images from left to right, half of the time."""
    shift: int = 2
    """Translate by up to this many label pixels (four image pixels each) in x and y."""
    published_shift: bool = False
    """Translate image and label by the same number of pixels, misaligned, as the published code does."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Scale by a random factor from MIN to MAX."""
    crop: tuple[int, int] | None = None
    """HEIGHT WIDTH of a random crop, padded by black where needed. Default: the resized image's size."""
    jitter: float = 0.0
    """Multiply brightness, contrast and saturation by up to 1 ± this."""

    output_dir: Path | None = None
    """The run's folder. Default: outputs/METHOD_DATASET in the repository."""
    resume: bool = False
    """Go on from the run's last checkpoint."""
    validate_every: int = 1
    """Validate, and write a checkpoint, every N epochs."""
    save_every: float = 30.0
    """Write a checkpoint also after this many minutes within an epoch."""
    steps_loss: int = 50
    """Log the losses every N steps."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run's folder."""
    visualize: bool = False
    """Show losses, val mIoU and pictures live in visdom."""
    port: int = 8097
    """Port of the visdom server on this machine."""
    override: bool = False
    """With --resume: insist on options that change what the run computes."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the networks in bfloat16 where that is safe; losses stay in float32. For GPUs."""
    tf32: bool = True
    """On GPUs, let float32 matrix products use TF32."""
    compile: bool = False
    """Compile the training step with torch.compile, once for every size that a batch has: where images differ, crop."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """torch.compile's mode. The other two replay the step as CUDA graphs, for small batches, which a GPU computes
    faster than it is told what to compute."""
    accumulate: int = 1
    """Split each batch into this many parts whose gradients add up, to save memory."""
    sync_batchnorm: bool = False
    """Compute BatchNorm over all processes (CUDA)."""
    deterministic: bool = False
    """Use deterministic algorithms where torch has them (on a CPU it always does)."""

    seed: int = 0
    """Seed of initialisation, data order, augmentation and dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        """Refuse what can't work before any work is done.

        Raises:
            UserError: a value is out of range.
        """
        for field in dataclasses.fields(self):
            if any(
                isinstance(part, float) and not math.isfinite(part)
                for part in self._parts(field.name)
            ):
                raise UserError(f"{self._flag(field.name)}; it must be finite")
        integers = [
            field.name
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), int)
        ]
        self.require(*integers, below=2**32)  # what numpy and torch take, the seed among them
        self.require(
            "subset_every",
            "num_epochs",
            "batch_size",
            "max_steps",
            "validate_every",
            "steps_loss",
            least=1,
        )
        self.require("lr_decay_epochs", "accumulate", least=1)
        self.require("num_workers", least=0, below=MANY)
        self.require(
            "shift", "weight_decay", "warmup_steps", "save_every", "eps", "lr_power", least=0
        )
        self.require(
            "height", "crop", least=MIN_HEIGHT, below=2**16
        )  # the network's four stages need as much
        self.require("lr", "scale", above=0)
        self.require("jitter", "ema", "dropout", "drop_path_rate", "betas", least=0, below=1)
        if self.schedule == "epoch" and self.num_epochs > self.lr_decay_epochs:
            raise UserError(
                f"--num-epochs {self.num_epochs} goes on after --lr-decay-epochs {self.lr_decay_epochs}, where the "
                "learning rate is 0; raise the latter"
            )
        if self.compile_mode != "default" and (not self.compile or self.accumulate > 1):
            raise UserError(
                f"{self._flag('compile_mode')}; it needs --compile, and goes with no --accumulate, "
                "whose gradients the next replay of a CUDA graph would overwrite"
            )
        if self.port != TrainingOptions.port and not self.visualize:
            raise UserError(f"{self._flag('port')}, of the visdom server; it needs --visualize")
        if self.schedule == "step" and self.lr_decay_epochs != TrainingOptions.lr_decay_epochs:
            raise UserError(
                f"{self._flag('lr_decay_epochs')}, of --schedule epoch; by step the rate is 0 in the end"
            )
        if not self.scale[0] <= self.scale[1]:
            raise UserError(f"{self._flag('scale')}; give the smaller factor first")
        if self.published_shift and (
            self.scale != (1.0, 1.0) or self.crop or self.loss_size == "full"
        ):
            raise UserError(
                "--published-shift knows quarter-size labels alone; leave out --scale, --crop and --loss-size full"
            )

    def require(
        self,
        *names: str,
        least: float = -math.inf,
        above: float = -math.inf,
        below: float = math.inf,
    ) -> None:
        """Raise UserError for a number out of range, or a tuple with one; None is welcome."""
        for name in names:
            if not all(least <= part and above < part < below for part in self._parts(name)):
                bounds = {"at least": least, "above": above, "below": below}
                must = " and ".join(
                    f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound)
                )
                raise UserError(f"{self._flag(name)}; it must be {must}")

    def _parts(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        return () if value is None else value if isinstance(value, tuple) else (value,)

    def _flag(self, name: str) -> str:
        return f"--{name.replace('_', '-')} is {' '.join(map(str, self._parts(name)))}"

    @classmethod
    def preset(cls, recipe: str) -> dict[str, Any]:
        """A recipe's values of the flags that these options have, the name included."""
        names = {field.name for field in dataclasses.fields(cls)}
        return {"recipe": recipe} | {
            name: value for name, value in RECIPES[recipe].items() if name in names
        }

    @classmethod
    def defaults(cls, arguments: list[str]) -> Self | None:
        """The options with the defaults of the recipe that the arguments name."""
        recipe = last_value(arguments, "--recipe")
        if not RECIPES.get(recipe):
            return None
        required = {
            f.name
            for f in dataclasses.fields(cls)
            if f.default is f.default_factory is dataclasses.MISSING
        }
        return cls(**dict.fromkeys(required, tyro.MISSING), **cls.preset(recipe))

    @property
    def recipe_batch_size(self) -> int:
        """The published batch of this script."""
        return int(type(self).batch_size)  # a dataclass keeps defaults on the class

    def find_weights(self) -> None:
        """Raise UserError for weights to start or to learn from that are missing: before the data is prepared."""

    def load_start(self, model: SegmentationModel, path: Path | None) -> None:
        """Load the weights to start from, if any, and choose how the network's input is normalised."""
        encoder_alone = path is not None and not load_backbone(model, path)
        if self.normalisation == "imagenet" or (self.normalisation == "auto" and encoder_alone):
            model.normalisation = IMAGENET

    def new_model(self, name: str, classes: Classes) -> SegmentationModel:
        """The network that is to learn, from random weights."""
        model = create_model(
            name, classes.num_outputs, drop_path_rate=self.drop_path_rate, dropout=self.dropout
        )
        model.class_names = classes.output_names
        return model

    @property
    def run_dir(self) -> Path:
        return self.output_dir or ROOT / "outputs" / f"{self.method}_{self.dataset}"

    @property
    def augmentation(self) -> Augmentation:
        names = {field.name for field in dataclasses.fields(Augmentation)}
        return Augmentation(**{name: getattr(self, name) for name in names})

    def as_json(self) -> dict[str, Any]:
        """The options as plain JSON values, method and network included."""
        values = {"method": self.method, "network": self.network} | dataclasses.asdict(self)
        values["datadir"] = Path(self.datadir).absolute()  # for those who read it in another folder
        return json.loads(json.dumps(values, default=str))


@dataclass(kw_only=True)
class StudentOptions(TrainingOptions):
    """Flags of every script that trains a student."""

    student_model: Literal[MODELS] = "segformer_b0"  # type: ignore[valid-type]
    """Architecture of the student."""
    student_weights: Path | None = None
    """Start the student from these weights (an ImageNet encoder or a whole network) instead of from scratch."""
    student_pretrained: bool = False
    """Start the student from its ImageNet encoder in ckpt_pretrained/."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student_weights is not None and self.student_pretrained:
            raise UserError(
                "--student-pretrained starts from other weights than --student-weights; leave one out"
            )

    def find_weights(self) -> None:
        self.student_start()

    def student_start(self) -> Path | None:
        """The weights that the student starts from, if any. Raises UserError if they are missing."""
        if self.student_weights is not None:
            return existing_weights(self.student_weights, "--student-weights")
        return pretrained_path(self.student_model) if self.student_pretrained else None

    def student(self, classes: Classes) -> SegmentationModel:
        """The student as it starts. Built first, so that one seed gives every method the same student."""
        model = self.new_model(self.student_model, classes)
        self.load_start(model, self.student_start())
        return model


@dataclass(kw_only=True)
class DistillationOptions(StudentOptions):
    """Flags of the distillation scripts."""

    teacher_model: Literal[MODELS] = "segformer_b2"  # type: ignore[valid-type]
    """Architecture of the teacher."""
    teacher_weights: Path | None = None
    """A trained teacher. Default: the published name in outputs/, e.g. segformerb2_teacher_cityscapes.pth."""
    validate_teacher: bool = False
    """Measure the teacher on the validation split first."""

    embed: Literal[0, 1, 2, 3, 4, 5] = 5
    """Patch embeddings that are distilled: 0 none, 1–4 that stage alone, 5 all four."""
    embed_weights: tuple[float, float, float, float] = (0.1, 0.1, 0.5, 1.0)
    """Weights of the four stages' embedding losses (with --embed 5; a single stage has weight 1)."""
    knowledge_distillation_loss: Literal["hcl", "CWloss", "KL"] = "hcl"
    """Loss between the fused features and the teacher's: hierarchical context, softmax over space, over channels."""
    review_kd_loss_weight: float = 1.0
    """Weight of the hierarchical context loss."""
    lambda_cwd: float = 1.0
    """Weight of CWloss and KL."""
    temperature: float = 1.0
    """Temperature of CWloss and KL."""
    logits_weight: float = 0.0
    """Weight of one more loss, between class probabilities: KL(teacher‖student). 0: none, as published."""
    logits_temperature: float = 1.0
    """Its temperature."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            "embed_weights", "review_kd_loss_weight", "lambda_cwd", "logits_weight", least=0
        )
        self.require("temperature", "logits_temperature", above=0)
        if self.embed != 5 and self.embed_weights != DistillationOptions.embed_weights:
            raise UserError(
                f"--embed-weights are those of --embed 5; with --embed {self.embed} leave them out"
            )
        if self.logits_temperature != 1.0 and not self.logits_weight:
            raise UserError(
                f"{self._flag('logits_temperature')}, of a loss that --logits-weight switches on"
            )
        hcl = self.knowledge_distillation_loss == "hcl"
        if hcl and (self.lambda_cwd, self.temperature) != (1.0, 1.0):
            raise UserError(
                "--lambda-cwd and --temperature are CWloss's and KL's; hcl has --review-kd-loss-weight"
            )
        if not hcl and self.review_kd_loss_weight != 1.0:
            raise UserError(
                "--review-kd-loss-weight is hcl's; CWloss and KL have --lambda-cwd and --temperature"
            )

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages whose embeddings are aligned."""
        return {0: (), 5: (1, 2, 3, 4)}.get(self.embed, (self.embed,))

    def losses(self) -> dict[str, Any]:
        """The loss arguments of `Distiller`."""
        name = self.knowledge_distillation_loss
        loss = FEATURE_LOSSES[name]
        hcl = name == "hcl"
        return {
            "feature_loss": loss if hcl else lambda s, t: loss(s, t, self.temperature),
            "feature_loss_name": name,
            "feature_weight": self.review_kd_loss_weight if hcl else self.lambda_cwd,
            "embed_weights": self.embed_weights if self.embed == 5 else (1.0,) * len(self.stages),
        }

    @property
    def compares_logits(self) -> bool:
        """Whether the teacher's logits count: in a loss, or in a measurement."""
        return self.validate_teacher or self.logits_weight > 0

    def find_weights(self) -> None:
        super().find_weights()
        self.teacher_start()

    def teacher_start(self) -> Path:
        """The trained teacher's weights. Raises UserError if they are missing."""
        suffix = "th" if self.teacher_model.startswith("pvt") else "pth"  # as released
        name = f"{self.teacher_model.replace('_', '')}_teacher_{self.dataset.lower()}.{suffix}"
        path = self.teacher_weights or ROOT / "outputs" / name
        if not path.exists():  # a folder is Hugging Face's
            raise UserError(
                f"no teacher at {path}; train one with train/teacher.py, or name one with --teacher-weights"
            )
        return path

    def teacher(self, classes: Classes) -> SegmentationModel:
        """The trained teacher; it may have other classes than the data where its logits don't count.

        Raises:
            UserError: no weights, weights of another model, or other classes where its logits count.
        """
        path = self.teacher_start()
        teacher = load_model(path)
        if teacher.name != self.teacher_model:
            raise UserError(
                f"{path} does not fit {self.teacher_model}; it looks like {teacher.name}: "
                f"add --teacher-model {teacher.name}, or name another file with --teacher-weights"
            )
        if self.compares_logits:
            classes.require(path, teacher.num_classes, teacher.class_names)
        return teacher


def existing_weights(path: Path, flag: str) -> Path:
    """What a flag names. Raises UserError if nothing is there; a folder is Hugging Face's."""
    if not path.exists():
        raise UserError(f"no weights at {path}; give {flag} a checkpoint")
    return path


def pretrained_path(model: str, otherwise: str = "") -> Path:
    """A model's ImageNet encoder: ckpt_pretrained/mit_b2.pth for segformer_b2.

    Raises:
        UserError: it is missing; `otherwise` is what can be done without it.
    """
    path = ROOT / "ckpt_pretrained" / f"{model.replace('segformer', 'mit')}.pth"
    if not path.is_file():
        raise UserError(
            f"no ImageNet weights at {path}; ckpt_pretrained/README.md says where to get them"
            + otherwise
        )
    return path


def last_value(arguments: list[str], flag: str) -> str:
    """What a flag is given on the command line, the last time; empty if it isn't."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return next(
        (value for name, value in reversed(list(itertools.pairwise(words))) if name == flag), ""
    )
