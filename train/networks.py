"""The networks of a run: the one that learns, and the teacher, which is trained already."""

from pathlib import Path

from datasets import Classes
from errors import UserError
from files import OUTPUTS, ROOT
from models import SegmentationModel, create_model, load_model, start_from
from models.layouts import IMAGENET
from models.zoo import download_advice
from train import distributed
from train.flags import DistillationOptions, RecipeOptions, StudentOptions


def pretrained_path(model: str) -> Path:
    """A model's ImageNet encoder: ckpt_pretrained/mit_b2.pth. Raises UserError if it's missing."""
    name = model.replace("segformer", "mit")  # as the encoder's authors call it
    path = ROOT / "ckpt_pretrained" / f"{name}.pth"
    if not path.is_file():
        raise UserError(
            f"no ImageNet weights at {path}; {download_advice(name)}start without them (a teacher "
            "by --from-scratch)"
        )
    return path


def teacher_path(options: DistillationOptions, dataset: str) -> Path:
    """`--teacher-weights`, or what train/teacher.py wrote for the data set, or the released file.

    Raises UserError if there is none of these.
    """
    if options.teacher_weights is not None:
        return options.teacher_weights
    trained = OUTPUTS / f"teacher_{dataset}" / "teacher_best.safetensors"
    model = options.teacher_model or "segformer_b2"
    suffix = "th" if model.startswith("pvt") else "pth"  # as released
    name = f"{model.replace('_', '')}_teacher_{dataset.lower()}"
    released = OUTPUTS / f"{name}.{suffix}"
    for path in (trained, released):
        if path.is_file():
            return path
    raise UserError(
        f"no teacher: neither {trained}, which train/teacher.py writes, nor {released}; "
        f"{download_advice(name)}--teacher-weights FILE or a name of the hub, "
        "nvidia/segformer-b2-finetuned-cityscapes-1024-1024"
    )


def new_network(
    name: str,
    recipe: RecipeOptions,
    classes: Classes,
    weights: Path | None,
    pretrained: bool,
) -> SegmentationModel:
    """A network that is to learn: from `weights`, its `pretrained` encoder, or random numbers.

    Raises UserError if the weights are missing or don't fit.
    """
    model = create_model(
        name,
        classes.num_outputs,
        drop_path_rate=recipe.drop_path_rate,
        dropout=recipe.dropout,
    )
    # Written into its files, so that whoever reads them can put the outputs in order.
    model.class_names = classes.output_names
    encoder_alone = False
    with distributed.fail_in_all_processes():  # a file may be missing on one node alone
        if weights is None and pretrained:
            weights = pretrained_path(name)
        if weights is not None:
            encoder_alone = not start_from(model, weights)
    if recipe.normalisation == "imagenet" or (recipe.normalisation == "auto" and encoder_alone):
        model.normalisation = IMAGENET
    return model


def new_student(
    options: StudentOptions, recipe: RecipeOptions, classes: Classes
) -> SegmentationModel:
    """The student as it starts."""
    return new_network(
        options.student_model,
        recipe,
        classes,
        options.student_weights,
        pretrained=options.student_pretrained,
    )


def load_teacher(
    options: DistillationOptions, dataset: str, classes: Classes, logits: bool = False
) -> SegmentationModel:
    """The trained teacher, frozen, with its classes in the data set's order.

    A teacher of other classes can teach features and embeddings. Where its logits count, by
    `--logits-weight` or by the method (`logits`), it must have the data set's classes.

    Raises UserError if there are no weights, or those of another model or of other classes.
    """
    logits = logits or options.logits_weight > 0
    with distributed.fail_in_all_processes():
        path = teacher_path(options, dataset)
        teacher = load_model(path)
        if options.teacher_model not in (None, teacher.name):
            raise UserError(
                f"{path} holds a {teacher.name}, not a {options.teacher_model}; leave "
                "--teacher-model out, or name other --teacher-weights"
            )
        if logits or teacher.class_names is not None:  # no names: taken to be in order
            try:
                order = classes.order(path, teacher.num_classes, teacher.class_names)
                teacher.reorder(order)
            except UserError:  # features and embeddings need no common classes
                if logits:
                    raise
    return teacher.eval().requires_grad_(False)
