"""What a run costs, by its options: parameters, multiply-accumulates (MACs) of a training step."""

from dataclasses import dataclass

import torch

from datasets import LAYOUTS
from models import create_model
from models.distillation import Distiller
from models.distillation.methods import METHODS, PUBLISHED
from models.info import count_macs, executed_macs, parameters
from train.options import DistillingOptions, TrainingOptions

PAPER_SIZE = (512, 1024)
"""Height and width of the image for which the paper counts MACs."""


@dataclass(frozen=True)
class Cost:
    """What a run costs.

    Attributes:
        model: the network that learns.
        parameters, macs: of that network, which is deployed, counted as in the paper.
        macs_per_step: of a training step as it runs, at the run's batch size and height.
        macs_in_all: of `max_steps`; without them of all epochs, in proportion to the data set.
    """

    model: str
    parameters: int
    macs: int
    macs_per_step: float
    macs_in_all: float


def cost_of(options: TrainingOptions, teacher_model: str | None = None) -> Cost:
    """The cost of a run, counted on the meta device: nothing is computed or allocated.

    A teacher that the options don't name is taken for `teacher_model`, or the paper's.
    """
    recipe, height = options.recipe, options.data.height
    outputs = LAYOUTS[options.data.dataset].classes.num_outputs
    values = {option.name: value for option, value in options.fields()}
    with torch.device("meta"):
        # What learns: the student, or the teacher where there is none.
        network = create_model(values.get("student_model") or values["teacher_model"], outputs)
        network.eval()
        paper_images = torch.empty(1, 3, *PAPER_SIZE)
        # As wide as Cityscapes' are, where they are not cropped.
        images = torch.empty(1, 3, *(recipe.crop or (height, 2 * height)))
        learner: Distiller = Distiller(network)
        teacher_macs = 0
        method = METHODS.get(PUBLISHED.get(options.method, options.method))
        if isinstance(options, DistillingOptions) and method is not None:
            named = options.distillation.teacher_model or teacher_model or "segformer_b2"
            teacher = create_model(named, outputs)
            learner = method.build(network, teacher.channels, None, options.distillation)
            with_logits = learner.needs_teacher_logits  # else its decode head doesn't run
            teacher_macs = executed_macs(teacher.eval(), images, logits=with_logits)
        # The backward pass takes twice as many as the forward pass. The teacher has none.
        macs_per_image = teacher_macs + 3 * executed_macs(learner.eval(), images)
        macs = count_macs(network, paper_images).total()
    macs_per_step = float(recipe.batch_size * macs_per_image)
    batch_size = options.published_batch_size if recipe.keep_steps else recipe.batch_size
    steps = recipe.max_steps or recipe.num_epochs / (batch_size * options.data.subset_every)
    return Cost(network.name, parameters(network), macs, macs_per_step, steps * macs_per_step)
