"""The model card of an exported network: what it is, how well it does, and how it was made, as far as that is known."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError
from eval.records import read_records
from files import read_json
from models.distillation.methods import PUBLISHED

if TYPE_CHECKING:
    from models.export import Export

CARD = """\
# {title}

{model} with {classes} outputs, {parameters:.2f} M parameters, for semantic segmentation{dataset}.
{method}

```python
from PIL import Image
from transformers import AutoImageProcessor, SegformerForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained(FOLDER)
model = SegformerForSemanticSegmentation.from_pretrained(FOLDER)
image = Image.open("street.jpg").convert("RGB")
outputs = model(**processor(image, return_tensors="pt"))
(labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(image.height, image.width)])
```

- **Input**: RGB, shorter side {height} pixels, {input}.
  transformers from version 5 resizes by the shorter side.
- **Output**: logits at a quarter of the input's size; {labels}.
- **Exactness**: transformers adds 1e-5 in every LayerNorm where SegFormer was trained with 1e-6 in most; the logits
  differ from the original's by about 1e-5 of the largest.

## Result

{result}

## Training

{recipe}

## Licence

Weights keep the terms of what they were trained from. NVIDIA's MiT ImageNet weights are for research, not commercial
use; Cityscapes and ACDC have licences of their own for non-commercial use. Before you publish this, set `license`
above accordingly, and name the data set there: what is known of it here is its layout.
"""
UNSAID = frozenset(
    [
        *(
            "method",
            "network",
            "dataset",
            "parameters",
            "data",
            "teacher",
        ),  # on the card already, or hashes
        *(
            "datadir",
            "train_list",
            "output_dir",
            "teacher_weights",
            "student_weights",
        ),  # paths: nobody's business
        *(
            "cache",
            "num_workers",
            "device",
            "resume",
            "override",
            "validate_every",
            "validate_teacher",
            "save_every",
        ),
        *("steps_loss", "tensorboard", "visualize", "port"),
    ]
)
"""Options of a run that don't belong on its card; all others may have changed its numbers."""
OF_TEACHING = (
    *(
        "teacher_model",
        "embed",
        "embed_weights",
        "knowledge_distillation_loss",
        "review_kd_loss_weight",
        "lambda_cwd",
    ),
    *("temperature", "logits_weight", "logits_temperature"),
)
"""Those that a run without a teacher has in vain."""
ALONE = ("teacher", "student")  # the methods without a teacher
PAPER = "TransKD (Liu et al., arXiv 2202.13393)"


def model_card(export: "Export") -> str:
    """The card in Markdown, with the Hugging Face hub's header."""
    from huggingface_hub import EvalResult, ModelCardData

    facts, model = export.facts, export.model
    method, dataset, score = facts.get("method"), facts.get("dataset"), facts.get("mean_iou")
    taught = method is not None and method not in ALONE
    title = f"{model.name}, {method}" if method else model.name
    results = None
    if dataset and score is not None:
        results = [
            EvalResult(
                task_type="image-segmentation",
                dataset_type=f"{dataset.lower()}-layout",
                dataset_name=f"a data set in the layout of {dataset}",
                dataset_split="val",
                metric_type="mean_iou",
                metric_name="mIoU in %, on maps of a quarter of the input's size",
                metric_value=round(100 * score, 2),
            )
        ]
    header = ModelCardData(
        model_name=title,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license="other",
        metrics=["mean_iou"] if results else None,
        eval_results=results,
        tags=[
            "segformer",
            "semantic-segmentation",
            *(["knowledge-distillation", "transkd"] if taught else []),
        ],
    )
    card = CARD.format(
        title=title,
        model=model.name,
        classes=model.num_classes,
        parameters=export.parameters / 1e6,
        dataset=f", trained on a data set in the layout of {dataset}" if dataset else "",
        method=training(method),
        height=export.height,
        input="scaled to [0, 1]"
        + (", then normalised" if model.normalisation else ", not normalised"),
        labels="the last one is `ignore`"
        if export.class_names[-1] == "ignore"
        else "one for each class",
        result=result_section(facts, export.record),
        recipe=recipe_section(export.recipe, export.record, taught),
    )
    return f"---\n{header.to_yaml()}\n---\n\n{card}"


def training(method: str | None) -> str:
    """Who taught the network, if anyone did."""
    if method is None:
        return f"Exported from a PyTorch implementation of {PAPER}."
    if method in ALONE:
        return (
            f"Trained without a teacher (method {method}), by a PyTorch implementation of {PAPER}."
        )
    if method in (*PUBLISHED, *PUBLISHED.values()):
        return f"Distilled by {method} of {PAPER}; only the student is here."
    return (
        f"Distilled by {method}, in a PyTorch implementation of {PAPER}; only the student is here."
    )


def read_run(weights: Path, facts: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The options and the records of the run in whose folder the weights lie; both empty where there is none."""
    try:
        options, record = (
            read_json(weights.parent / "options.json"),
            read_records(weights.parent / "metrics.jsonl"),
        )
    except UserError:  # no run's folder, or it was damaged
        return {}, []
    if options is None:
        return {}, []
    same = all(options.get(key) == facts.get(key) for key in ("method", "dataset"))
    return (options, record) if same and "method" in facts else ({}, [])


def result_section(facts: dict[str, Any], record: list[dict[str, Any]]) -> str:
    score, step = facts.get("mean_iou"), facts.get("step")
    if score is None:
        return "None is recorded in these weights."
    text = f"{100 * score:.2f} % mIoU on the validation split after step {step or '?'}, on maps of a quarter of the "
    text += "input's size."
    measured = [
        event for event in record if event.get("event") == "val" and event.get("step") == step
    ]
    if not measured:
        return text
    ious = {name: iou for name, iou in measured[-1].get("per_class", {}).items() if iou is not None}
    rows = "\n".join(f"| {name} | {100 * iou:.2f} |" for name, iou in ious.items())
    text += "\nOf the classes that occur there, in the labels or in a prediction:"
    return f"{text}\n\n| class | IoU in % |\n|---|---|\n{rows}"


def recipe_section(options: dict[str, Any], record: list[dict[str, Any]], taught: bool) -> str:
    if not options:
        return "Nothing is recorded beside these weights."
    unsaid = UNSAID if taught else UNSAID | set(OF_TEACHING)
    text = ", ".join(
        f"{key} {value}"
        for key, value in options.items()
        if key not in unsaid and value is not None
    )
    started = [event for event in record if event.get("event") == "start"]
    if not started:
        return f"Options: {text}."
    start = started[-1]
    versions = ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items())
    revision = f"Code at revision {start['revision']}. " if start.get("revision") else ""
    return f"Options: {text}.\n\n{revision}Made on {start.get('device')} with {versions}."
