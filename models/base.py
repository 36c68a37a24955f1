"""What all segmentation models have in common: an encoder of four stages and a decode head."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Normalisation(NamedTuple):
    """(image - mean) / std for each channel of RGB images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> the same shape."""
        # By numbers: tensors of mean and deviation would have to be on the images' device.
        channels = [(images[:, c] - self.mean[c]) / self.std[c] for c in range(3)]
        return torch.stack(channels, dim=1)


class SegmentationOutput(NamedTuple):
    """What every segmentation model of this project returns."""

    logits: Tensor | None  # (B, classes, ceil(H/4), ceil(W/4)); None when they were not asked for
    features: tuple[Tensor, ...]  # F1..F4, (B, C_i, h_i, w_i)
    embeddings: tuple[Tensor, ...]  # E1..E4, (B, h_i·w_i, C_i)


class SegmentationModel(nn.Module):
    """An encoder of four stages at strides 4, 8, 16, 32 and a decode head.

    The encoder maps images (B, 3, H, W) to features F1..F4 (B, C_i, h_i, w_i) and patch embeddings
    E1..E4 (B, h_i·w_i, C_i). The head maps the features to logits (B, classes, h_1, w_1); its last
    layer is called `classifier`.
    """

    # Prefixes of parameter names, as published and as they are here. `state_dict` and
    # `load_state_dict` speak the published names.
    published_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    class_names: tuple[str, ...] | None = None  # one for every output, where the weights tell them
    normalisation: Normalisation | None = None  # of the input; the paper's models have none

    def __init__(
        self, name: str, channels: tuple[int, ...], encoder: nn.Module, head: nn.Module
    ) -> None:
        super().__init__()
        self.name = name
        self.channels = channels
        self.encoder = encoder
        self.head = head
        self.num_classes: int = head.classifier.out_channels  # type: ignore[assignment, union-attr]
        use_published_names(self, self.published_names)

    def forward(self, images: Tensor, logits: bool = True) -> SegmentationOutput:
        """Images (B, 3, H, W), RGB in [0, 1], any size -> logits, features, embeddings.

        With `logits=False` the head does not run: a teacher's logits enter no loss of TransKD.
        """
        if self.normalisation is not None:
            images = self.normalisation(images)
        features, embeddings = self.encoder(images)
        return SegmentationOutput(self.head(features) if logits else None, features, embeddings)

    @torch.no_grad()
    def reorder(self, order: list[int]) -> None:
        """Put the outputs into another order: output i becomes what output `order[i]` was."""
        classifier: Any = self.head.classifier
        classifier.weight.copy_(classifier.weight[order])
        classifier.bias.copy_(classifier.bias[order])
        if self.class_names is not None:
            self.class_names = tuple(self.class_names[i] for i in order)


def use_published_names(module: nn.Module, names: tuple[tuple[str, str], ...]) -> None:
    """Let a module's `state_dict` and `load_state_dict` speak other names than its attributes.

    `names` are pairs of prefixes, (published, ours). The first that fits a key is exchanged.
    """

    def rename(column: int, state: dict[str, Any], prefix: str) -> None:
        # In place, as torch's hooks ask for; what is popped and set again keeps the keys' order.
        for key in [key for key in state if key.startswith(prefix)]:
            value = state.pop(key)
            name = key.removeprefix(prefix)
            for pair in names:
                if name.startswith(pair[column]):
                    name = pair[1 - column] + name.removeprefix(pair[column])
                    break
            state[prefix + name] = value

    module.register_state_dict_post_hook(lambda _, state, prefix, *more: rename(1, state, prefix))
    # Here torch hands over a copy of the state that is loaded.
    module.register_load_state_dict_pre_hook(
        lambda _, state, prefix, *more: rename(0, state, prefix)
    )
