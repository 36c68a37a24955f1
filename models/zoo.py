"""The public weights: which there are, and a download that puts them where the scripts look for them.

    python -m models.zoo list [NAME …]
    python -m models.zoo download mit_b2 segformerb2_teacher_cityscapes
    python -m models.zoo download segformerb0_TransKD_EA_acdc --to DIR

A broken download goes on where it stopped when the command is given again, or from the start where the server can't do
that. A file takes its name only after it was read and found to hold the very network that it should. Needs
`pip install gdown==6.5.1`.
"""

import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import tyro
from rich.console import Console
from rich.table import Table

import cli
from errors import UserError
from models.checkpoints import load_backbone, load_model
from models.factory import create_model

ROOT = Path(__file__).resolve().parents[1]
DRIVE = "https://drive.google.com/"
MIT_FOLDER = f"{DRIVE}drive/folders/1b7bwrInTW4VLEm27YawHOAMSMikga2Ia"
RELEASE_FOLDER = f"{DRIVE}drive/folders/1vHRH3nUCdKVSrOe_VX_L9GrcJNytmUAj"
RETRIES, TIMEOUT = 1, 30.0  # of one command; seconds without a byte
# What gdown says when it can't go on with the part of a file that is there.
STUCK = ("byte range", "multiple temporary files", "416")


@dataclass(frozen=True)
class Weights:
    """One file of the zoo."""

    file: str
    """Where it goes, below the repository."""
    model: str
    """What it holds."""
    what: str
    url: str
    page: str
    """Where a person finds it."""

    @property
    def name(self) -> str:
        return Path(self.file).stem

    @property
    def is_encoder(self) -> bool:
        return self.file.startswith("ckpt_pretrained/")

    def check(self, path: Path) -> None:
        """Read it.

        Raises:
            UserError: it is damaged, or not the network that it should be.
        """
        if self.is_encoder:
            load_backbone(create_model(self.model), path)
            return
        model = load_model(path)
        if (model.name, model.num_classes) != (self.model, 20):
            raise UserError(
                f"{path} holds a {model.name} with {model.num_classes} classes, not a {self.model} with 20"
            )


def _zoo() -> dict[str, Weights]:
    entries = [
        Weights(
            f"ckpt_pretrained/mit_b{i}.pth",
            f"segformer_b{i}",
            "ImageNet encoder",
            f"https://huggingface.co/nvidia/mit-b{i}/resolve/main/pytorch_model.bin",
            MIT_FOLDER,
        )
        for i in range(6)
    ]
    entries += [
        Weights(
            f"ckpt_pretrained/pvt_v2_b{i}.pth",
            f"pvt_v2_b{i}",
            "ImageNet encoder",
            f"https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b{i}.pth",
            "https://github.com/whai362/PVT/releases/tag/v2",
        )
        for i in range(6)
    ]
    for file, model, drive_id in (
        ("segformerb2_teacher_cityscapes.pth", "segformer_b2", "1mixZrRm-nSOhIjM4ltI_wegc14iciZZS"),
        ("segformerb0_student_cityscapes.pth", "segformer_b0", "1BCA2LHtWSSUzF0xbWELwLw66SdduYJ3X"),
        (
            "segformerb0_TransKDBase_cityscapes.pth",
            "segformer_b0",
            "1KkQ2IfEfQnisWle4yob3JDEBYvGsGvhn",
        ),
        (
            "segformerb0_TransKD_GL_cityscapes.pth",
            "segformer_b0",
            "1MSQkF8wbC-QPy9vFQOazjkEOKPbUK1i0",
        ),
        (
            "segformerb0_TransKD_EA_cityscapes.pth",
            "segformer_b0",
            "1NejCOa2S5t8_8ooJT1Yauzrz-POCwr5H",
        ),
        ("pvtv2b2_teacher_cityscapes.th", "pvt_v2_b2", "1D5IDzWe1uEzuGqXnDHsF_n5U0cvh1I8t"),
        ("segformerb2_teacher_acdc.pth", "segformer_b2", "1o-z_Jaty4ENJ2ruvVMGUng1yOKamMxU1"),
        ("segformerb0_student_acdc.pth", "segformer_b0", "1JL-yXf4izAwHScLN3Vt330HQjs1V4B-a"),
        ("segformerb0_TransKDBase_acdc.pth", "segformer_b0", "1B_7p-31WKtXuWm1CPW0l9mBISUkMjZnk"),
        ("segformerb0_TransKD_GL_acdc.pth", "segformer_b0", "1ZRi7mUXXDYFpO4MRC5ekPCqoSQwFYgYt"),
        ("segformerb0_TransKD_EA_acdc.pth", "segformer_b0", "1FpTdOkmjy2p48R6cezi43J2HbOVVuUA1"),
    ):
        method, _, data = Path(file).stem.partition("_")[2].rpartition("_")
        url = f"{DRIVE}uc?id={drive_id}"
        entries.append(Weights(f"outputs/{file}", model, f"{data}, {method}", url, RELEASE_FOLDER))
    return {entry.name: entry for entry in entries}


ZOO = _zoo()


@dataclass
class Options:
    """List the public weights, or download some of them."""

    action: Annotated[Literal["list", "download"], tyro.conf.Positional]
    """What to do."""
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which, by the names that `list` shows; `list` itself shows all without."""
    to: Path | None = None
    """download: the folder to put them in. Default: ckpt_pretrained/ and outputs/, where the scripts look."""
    mirror: str | None = None
    """download: fetch URL/FILE, e.g. from a server of your own, instead of the published places."""


def main(options: Options) -> None:
    if options.action == "list":
        if options.to is not None or options.mirror is not None:
            raise UserError("--to and --mirror are for download; leave them out, or download")
        Console().print(table([find(name) for name in options.names] or ZOO.values()))
        return
    if options.mirror is not None and not re.match(r"https?://[^/[]", options.mirror):  # [: no IPv6
        raise UserError(
            f"--mirror {options.mirror} is no URL; give one such as https://HOST/FOLDER"
        )
    if not options.names:
        raise UserError("name what to download; `python -m models.zoo list` shows the names")
    for weights in [find(name) for name in options.names]:
        path = ROOT / weights.file if options.to is None else options.to / Path(weights.file).name
        url = (
            weights.url
            if options.mirror is None
            else f"{options.mirror.rstrip('/')}/{Path(weights.file).name}"
        )
        if path.exists():
            try:
                weights.check(path)
            except UserError as error:
                raise UserError(
                    f"{path} is there already but not right ({error}); remove it and try again"
                ) from error
            print(f"{path} is there already")
            continue
        download(weights, url, path)
        print(f"{path}: {weights.model}, {weights.what}, {path.stat().st_size / 1e6:.1f} MB")


def table(entries: Iterable[Weights]) -> Table:
    """One row a file."""
    result = Table(caption="MiT's weights, and what was trained from them, are for research alone")
    for column in ("name", "holds", "here"):
        result.add_column(column, no_wrap=True)
    for weights in entries:
        holds = weights.model + (f", {weights.what}" if weights.is_encoder else "")
        result.add_row(weights.name, holds, "yes" if (ROOT / weights.file).exists() else "")
    return result


def find(name: str) -> Weights:
    """By its name or file name. UserError with the closest names if there is none."""
    key = Path(name).stem if name not in ZOO else name
    if key not in ZOO:
        close = difflib.get_close_matches(key, ZOO, cutoff=0.5) or [
            "mit_b2",
            "segformerb2_teacher_cityscapes",
        ]
        raise UserError(
            f"no weights are called {name!r}; perhaps {', '.join(close)} (`list` shows all)"
        )
    return ZOO[key]


def download(weights: Weights, url: str, path: Path) -> None:
    """Fetch one file, going on with what an earlier try left, and give it its name when it is found right.

    Raises:
        UserError: gdown is missing, the host can't be reached, or what came is something else.
    """
    try:
        import gdown
        import requests
    except ImportError as error:
        raise UserError(
            f"downloading needs gdown; pip install gdown==6.5.1, or save {weights.page} by hand"
        ) from error
    aside = path.with_name(f".{path.name}.download")

    def fetch() -> None:
        gdown.download(
            url,
            str(aside),
            resume=True,
            retries=RETRIES,
            timeout=TIMEOUT,
            log_messages={"start": "", "output": ""},
        )

    by_hand = f"try again, or open {weights.page} in a browser and save the file as {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"{weights.name} from {url}", file=sys.stderr)
        try:
            fetch()
        except (gdown.exceptions.DownloadError, requests.RequestException) as error:
            if not any(reason in str(error) for reason in STUCK):
                raise
            for part in path.parent.glob(f"{aside.name}*.part"):
                part.unlink()
            fetch()
    except (gdown.exceptions.DownloadError, requests.RequestException) as error:
        reason = " ".join(str(error).split())
        if isinstance(error.__cause__ or error, requests.ConnectionError):
            reason = f"{urlsplit(url).netloc} can't be reached"
        raise UserError(f"can't fetch {weights.name} from {url} ({reason}); {by_hand}") from error
    except OSError as error:
        raise UserError(
            f"can't write {path} ({error.strerror or error}); choose another folder by --to"
        ) from error
    try:
        weights.check(aside)
    except UserError as error:
        aside.unlink()
        raise UserError(
            f"what came from {url} is not {weights.name} ({error}); {by_hand}"
        ) from error
    aside.chmod(0o644)  # gdown's are for their owner alone
    aside.replace(path)


if __name__ == "__main__":
    cli.run(main, Options)
