"""Score a network on a split."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from datasets import Classes, SceneDataset
from datasets.transforms import require_height
from errors import UserError
from eval.metrics import confusion_matrix, scores
from eval.predictor import ahead, at_size, forward, one_size_batches, to_pixels, upsample
from progress import track

Protocol = Literal["paper", "full"]
Network = Callable[[Tensor], Tensor]  # uint8 images (B, 3, H, W) -> logits (B, C, h, w)


@dataclass(frozen=True)
class Views:
    """For --protocol full: the views of an image whose class probabilities are averaged."""

    scales: tuple[float, ...] = (1.0,)
    """Sizes at which the image is seen, as multiples of --height."""
    flip: bool = False
    """See the mirrored image as well."""
    window: tuple[int, int] | None = None
    """HEIGHT WIDTH of a sliding window, instead of the whole image. Where windows overlap, their
    logits are averaged."""
    stride: tuple[int, int] | None = None
    """HEIGHT WIDTH by which the window moves. Default: the window's size."""

    def __post_init__(self) -> None:
        window = self.window or (1, 1)
        stride = self.stride or window
        fits = stride[0] <= window[0] and stride[1] <= window[1]
        if not self.scales or min(*self.scales, *stride) <= 0 or not fits:
            raise UserError("scales and stride must be above 0, no stride above its window")
        if self.window is not None:
            require_height(min(self.window))

    @property
    def once(self) -> bool:
        """Whether it is one view, of the whole image."""
        return self.scales == (1.0,) and not self.flip and self.window is None

    def probabilities(
        self,
        network: Network,
        photograph: Image.Image,
        height: int,
        size: tuple[int, ...],
        classes: int,
    ) -> Tensor:
        """Probabilities (classes, *size) of the first outputs, averaged over all views.

        The photograph's shorter side becomes `height` at scale 1.
        """
        per_view = []
        for scale in self.scales:
            scaled = round(scale * height)
            require_height(scaled)
            image = to_pixels(photograph, scaled)[None]
            for mirrored in (False, True) if self.flip else (False,):
                logits = self.logits(network, image.flip(-1) if mirrored else image)
                part = upsample(logits[:, :classes], size).softmax(1)
                per_view.append(part.flip(-1) if mirrored else part)
        return torch.stack(per_view).mean(0)[0]

    def logits(self, network: Network, image: Tensor) -> Tensor:
        """Logits of the whole image at the network's own size, or by windows at the image's."""
        if self.window is None:
            return network(image)
        height, width = image.shape[-2:]
        rows, columns = min(self.window[0], height), min(self.window[1], width)
        down, right = self.stride or self.window
        total: Any = 0.0
        count = torch.zeros(height, width)
        for y in range(0, height - rows + down, down):
            for x in range(0, width - columns + right, right):
                top, left = min(y, height - rows), min(x, width - columns)  # the last is moved in
                window = image[..., top : top + rows, left : left + columns]
                logits = upsample(network(window), (rows, columns))
                total += F.pad(logits, (left, width - left - columns, top, height - top - rows))
                count[top : top + rows, left : left + columns] += 1
        return total / count.to(total.device)


ONE_VIEW = Views()


@dataclass
class Evaluation:
    """A split's counts, and those of each condition if there are any."""

    protocol: Protocol
    classes: Classes
    names: list[str]
    counts: Tensor  # int64 (N, n + 1, n + 1): the confusion matrix of each image
    loss: float | None = None  # cross entropy, where class weights were given
    conditions: "dict[str, Evaluation]" = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The scores as fractions, None for a class that does not occur."""
        result: dict[str, Any] = {"protocol": self.protocol, "images": len(self.names)}
        result |= scores(self.counts.sum(0), self.classes)
        if self.loss is not None:
            result["loss"] = self.loss
        if self.conditions:
            result["conditions"] = {name: part.as_json() for name, part in self.conditions.items()}
        return result

    def details(self) -> dict[str, Any]:
        """Pixel counts (a row for each true class, a column for each predicted one, "ignore" last),
        and each image's mean IoU over the classes that occur in it."""
        per_image = {}
        for name, counts in zip(self.names, self.counts, strict=True):
            per_image[name] = scores(counts, self.classes)["mean_iou"]
        confusion = self.counts.sum(0)[: self.classes.num_classes].tolist()
        return {"confusion": confusion, "per_image": per_image}


def evaluate(
    model: nn.Module,
    dataset: SceneDataset,
    *,
    protocol: Protocol = "paper",
    views: Views = ONE_VIEW,
    batch_size: int = 1,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
    class_weights: Tensor | None = None,
) -> Evaluation:
    """Score `model` on every image of `dataset`, overall and per condition.

    `paper`: argmax of the quarter-size logits, ignore output included, against the quarter-size
    label. `full`: the logits of the real classes are upsampled (bilinear) to the label file's own
    size before the argmax, as cityscapesScripts scores a submission; `views` belong to it. Among
    several processes (torch.distributed) each takes its share of the images and all get the result.
    With `class_weights`, which are for `paper`, it has the cross entropy too.

    Raises UserError if no pixel has a label, or the network gives NaN or infinity.
    """
    classes = dataset.classes
    real = classes.num_classes  # without "ignore"
    outputs = classes.num_outputs
    counts = torch.zeros(len(dataset), outputs, outputs, dtype=torch.int64, device=device)
    not_finite = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros(2, device=device)  # its sum, and that of the weights
    in_group = dist.is_initialized()
    first, step = (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
    mine = range(first, len(dataset), step)

    def read(index: int) -> tuple[Tensor, Tensor, int]:
        image, label, _ = dataset[index]
        if protocol == "full":
            label = torch.from_numpy(dataset.full_label(index))
        return image, label, index

    network = partial(forward, model, device=device)
    was_training = model.training
    model.eval()
    with ThreadPoolExecutor(num_workers or 1) as readers:
        read_ahead = ahead(readers, read, mine, 2 * batch_size + 4)
        items: Iterable[Any] = (reading.result() for _, reading in read_ahead)
        if progress:
            items = track(items, "evaluating", len(mine))
        for batch in one_size_batches(items, batch_size, lambda item: item[0].shape):
            images, labels, indices = zip(*batch, strict=True)
            logits = network(torch.stack(images)) if views.once else None
            truths = [label.to(device) for label in labels]
            if class_weights is not None and logits is not None:
                truth = torch.stack(truths).long()
                total = F.cross_entropy(logits.float(), truth, class_weights, reduction="sum")
                loss += torch.stack([total, class_weights[truth].sum()])
            for row, (label, index) in enumerate(zip(truths, indices, strict=True)):
                if logits is None:
                    photograph = dataset.photograph(index)
                    height = dataset.height
                    prediction = views.probabilities(network, photograph, height, label.shape, real)
                elif protocol == "full":
                    prediction = at_size(logits[row], label.shape, real)
                else:
                    prediction = logits[row]
                if prediction.is_floating_point():  # NaN would count as the first class
                    not_finite += ~prediction.isfinite().all()
                counts[index] = confusion_matrix(prediction[None], label[None], outputs)
    model.train(was_training)
    if in_group:
        dist.all_reduce(counts)
        dist.all_reduce(not_finite)
        dist.all_reduce(loss)
    if not_finite:
        raise UserError("the network's outputs are NaN or infinite; take earlier weights")
    counts = counts.cpu()  # once, instead of for every image
    if not counts[:, :real].any():
        raise UserError("every label pixel is ignored, as in test splits; choose a labelled split")

    names = [sample.name for sample in dataset.samples]
    evaluation = Evaluation(protocol, classes, names, counts)
    if class_weights is not None:
        evaluation.loss = float(loss[0] / loss[1])
    conditions = [sample.condition for sample in dataset.samples]
    for condition in filter(None, dict.fromkeys(conditions)):
        chosen = [i for i, name in enumerate(conditions) if name == condition]
        part = Evaluation(protocol, classes, [names[i] for i in chosen], counts[chosen])
        evaluation.conditions[condition] = part
    return evaluation
