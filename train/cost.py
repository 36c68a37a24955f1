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
        parameters, macs: of the network that is deployed, counted as in the paper.
        macs_per_step: of a training step as it runs, at the run's batch size and height.
    """

    parameters: int
    macs: int
    macs_per_step: float


def cost_of(options: TrainingOptions) -> Cost:
    """The cost of a run, counted on the meta device: nothing is computed or allocated."""
    height = options.data.height
    outputs = LAYOUTS[options.data.dataset].classes.num_outputs
    values = {option.name: value for option, value in options.fields()}
    with torch.device("meta"):
        # What learns: the student, or the teacher where there is none.
        network = create_model(values.get("student_model") or values["teacher_model"], outputs)
        network.eval()
        paper_images = torch.empty(1, 3, *PAPER_SIZE)
        images = torch.empty(1, 3, height, 2 * height)  # as wide as Cityscapes' are
        learner: Distiller = Distiller(network)
        teacher_macs = 0
        method = METHODS.get(PUBLISHED.get(options.method, options.method))
        if isinstance(options, DistillingOptions) and method is not None:
            teacher = create_model(options.distillation.teacher_model or "segformer_b2", outputs)
            learner = method.build(network, teacher.channels, None, options.distillation)
            with_logits = learner.needs_teacher_logits  # else its decode head doesn't run
            teacher_macs = executed_macs(teacher.eval(), images, logits=with_logits)
        # The backward pass takes twice as many as the forward pass. The teacher has none.
        macs_per_image = teacher_macs + 3 * executed_macs(learner.eval(), images)
        macs = count_macs(network, paper_images).total()
    macs_per_step = float(options.recipe.batch_size * macs_per_image)
    return Cost(parameters(network), macs, macs_per_step)
