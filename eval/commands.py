"""What the evaluation scripts share: score a split and print the table, or render it."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from datasets.classes import Encoding
from errors import UserError
from eval.inference import Evaluation, evaluate, render
from eval.metrics import percent
from eval.options import OUTPUTS, ColorOptions, IoUOptions, claim_folder, open_model_and_data
from files import write_json
from models.checkpoints import read_facts

PROTOCOLS = {
    "paper": "on quarter-size maps (paper)",
    "full": "at the labels' own size (full)",
}


def score(dataset: str, options: IoUOptions) -> Evaluation:
    """Evaluate, print the IoU table, write `--json`."""
    model, data, weights, device = open_model_and_data(options, dataset)
    evaluation = evaluate(
        model,
        data,
        protocol=options.protocol,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=device,
    )
    title = f"{weights} on {dataset} {options.subset}, {evaluation.images} images"
    print(title)  # not as the table's: it may be longer than the table is wide
    Console().print(iou_table(evaluation))
    if options.json is not None:
        source = {
            "dataset": dataset,
            "datadir": str(options.datadir.resolve()),
            "subset": options.subset,
            "height": options.height,
            "weights": str(weights),
            "step": read_facts(weights).get(
                "step"
            ),  # of training, by which a report knows that it went on
        }
        write_json(source | evaluation.as_json() | evaluation.details(), options.json)
    return evaluation


def paint(dataset: str, options: ColorOptions) -> list[Path]:
    """Render every image of the split, say where the pictures are, write `--json`."""
    if options.overlay is not None and not 0 <= options.overlay <= 1:
        raise UserError(f"--overlay {options.overlay} is no share of colour; give 0 to 1")
    if (options.overlay is not None) + options.label_ids + options.train_ids > 1:
        raise UserError(
            "--overlay, --label-ids and --train-ids exclude each other; run the script once for each"
        )
    ids: Encoding | None = (
        "label_ids" if options.label_ids else "train_ids" if options.train_ids else None
    )
    model, data, weights, device = open_model_and_data(options, dataset, require_labels=False)
    run = [weights.absolute().parent.name] if (weights.parent / "options.json").is_file() else []
    folder = options.output_dir or OUTPUTS.joinpath("color", *run, weights.stem)
    for place in {
        options.datadir,
        *(options.datadir / Path(sample.name).parts[0] for sample in data.samples),
    }:
        if folder.resolve().is_relative_to(place.resolve()):  # which may be a link
            raise UserError(f"--output-dir {folder} lies in the data set; choose another folder")
    claim_folder(folder)
    pictures = render(
        model,
        data,
        folder,
        size=options.size,
        overlay=options.overlay,
        ids=ids,
        flat=options.flat,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=device,
    )
    print(f"{len(pictures)} pictures in {folder}")
    if options.json is not None:
        files = [str(picture) for picture in pictures]
        write_json({"weights": str(weights), "images": len(files), "files": files}, options.json)
    return pictures


def iou_table(evaluation: Evaluation) -> Table:
    """Per class and mean, in percent; one column for the split and one for each condition."""
    columns = {"all": evaluation, **evaluation.conditions}
    table = Table(caption=f"IoU in % {PROTOCOLS[evaluation.protocol]}")
    table.add_column("class")
    for name in columns:
        table.add_column(name if evaluation.conditions else "IoU", justify="right")
    scores = [part.counts.scores() for part in columns.values()]
    labelled = (evaluation.counts.tp + evaluation.counts.fn).tolist()
    for name, pixels in zip(evaluation.counts.classes.names, labelled, strict=True):
        wrong = "" if pixels or scores[0]["per_class"][name] is None else " (in no label)"
        table.add_row(name + wrong, *(percent(part["per_class"][name]) for part in scores))
    table.add_section()
    means = [percent(part["mean_iou"]) for part in scores]
    table.add_row("mean", *means, style="bold")
    published = [percent(part["mean_iou_published"]) for part in scores]
    if published != means:
        table.add_row("published mean (absent = 0)", *published)
    return table
