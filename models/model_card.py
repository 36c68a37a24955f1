"""The model card of an exported network: what it is, how well it does, how it was made."""

from pathlib import Path

from files import read_json
from models.base import SegmentationModel
from models.checkpoints import Checkpoint

CARD = """\
---
library_name: transformers
pipeline_tag: image-segmentation
license: other
tags: [segformer, semantic-segmentation]
---

# {model}

Exported from a PyTorch implementation of TransKD (Liu et al., arXiv 2202.13393).

```python
processor = transformers.AutoImageProcessor.from_pretrained(FOLDER)
model = transformers.SegformerForSemanticSegmentation.from_pretrained(FOLDER)
outputs = model(**processor(image, return_tensors="pt"))
(labels,) = processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])
```

- **Input**: RGB, shorter side {height} pixels, scaled to [0, 1], {normalised}. transformers from
  version 5 resizes by the shorter side.
- **Output**: {classes} logits at a quarter of the input's size. They differ from the original's by
  about 1e-5 of the largest, for transformers adds 1e-5 in every LayerNorm, SegFormer 1e-6 in most.
{recorded}

Weights keep the terms of what they were trained from. NVIDIA's MiT ImageNet weights are for
research, not commercial use; Cityscapes and ACDC have licences of their own for non-commercial use.
Before you publish this, set `license` above accordingly, and name the data set here.
"""


def model_card(model: SegmentationModel, checkpoint: Checkpoint) -> str:
    """The card in Markdown, with the Hugging Face hub's header."""
    facts = checkpoint.facts
    recorded = {
        "Method": facts.get("method"),
        "Layout of the data": facts.get("dataset"),
        "Steps": facts.get("step"),
    }
    if "mean_iou" in facts:
        score = f"{100 * facts['mean_iou']:.2f} % mIoU on maps of a quarter of the input's size"
        recorded["Validation split"] = score
    # The run's folder, where the weights still lie in it, tells its options. Numbers alone are
    # published: words may be paths.
    options = read_json(Path(checkpoint.source).with_name("options.json")) or {}
    if options.get("method", "") == facts.get("method"):
        numbers = [f"{key} {v}" for key, v in options.items() if isinstance(v, int | float)]
        recorded["Options"] = ", ".join(numbers)
    lines = [f"- **{what}**: {value}" for what, value in recorded.items() if value is not None]
    return CARD.format(
        model=model.name,
        classes=model.num_classes,
        height=facts.get("height", 512),
        normalised="then normalised" if model.normalisation else "not normalised",
        recorded="\n".join(lines),
    )
