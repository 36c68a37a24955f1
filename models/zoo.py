"""The public weights: which there are, and a download that puts them where the scripts look.

    python -m models.zoo list
    python -m models.zoo download mit_b2 segformerb2_teacher_cityscapes
    python -m models.zoo download segformerb0_TransKD_EA_acdc --to DIR

A download that broke off is continued when the command is given again. A file takes its name only
after it was read and found to hold the network that it should. Needs `pip install gdown==6.5.1`.
What `list` calls "hub" is downloaded when it is named where a path is expected: `--teacher-weights
nvidia/segformer-b2-finetuned-cityscapes-1024-1024`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import cli
from datasets.classes import CITYSCAPES
from errors import UserError, require
from files import ROOT
from models.factory import create_model
from models.loading import load_model, start_from

# Folders of Google Drive, for a person with a browser.
MIT_PAGE = "https://drive.google.com/drive/folders/1b7bwrInTW4VLEm27YawHOAMSMikga2Ia"
RELEASE_PAGE = "https://drive.google.com/drive/folders/1vHRH3nUCdKVSrOe_VX_L9GrcJNytmUAj"
RELEASED = {  # in outputs/, with their ids on Google Drive
    "segformerb2_teacher_cityscapes.pth": "1mixZrRm-nSOhIjM4ltI_wegc14iciZZS",
    "segformerb0_student_cityscapes.pth": "1BCA2LHtWSSUzF0xbWELwLw66SdduYJ3X",
    "segformerb0_TransKDBase_cityscapes.pth": "1KkQ2IfEfQnisWle4yob3JDEBYvGsGvhn",
    "segformerb0_TransKD_GL_cityscapes.pth": "1MSQkF8wbC-QPy9vFQOazjkEOKPbUK1i0",
    "segformerb0_TransKD_EA_cityscapes.pth": "1NejCOa2S5t8_8ooJT1Yauzrz-POCwr5H",
    "pvtv2b2_teacher_cityscapes.th": "1D5IDzWe1uEzuGqXnDHsF_n5U0cvh1I8t",
    "segformerb2_teacher_acdc.pth": "1o-z_Jaty4ENJ2ruvVMGUng1yOKamMxU1",
    "segformerb0_student_acdc.pth": "1JL-yXf4izAwHScLN3Vt330HQjs1V4B-a",
    "segformerb0_TransKDBase_acdc.pth": "1B_7p-31WKtXuWm1CPW0l9mBISUkMjZnk",
    "segformerb0_TransKD_GL_acdc.pth": "1ZRi7mUXXDYFpO4MRC5ekPCqoSQwFYgYt",
    "segformerb0_TransKD_EA_acdc.pth": "1FpTdOkmjy2p48R6cezi43J2HbOVVuUA1",
}
HUB_TEACHERS = {  # of the Hugging Face hub, trained on Cityscapes at 1024×1024
    f"nvidia/segformer-b{i}-finetuned-cityscapes-1024-1024": f"segformer_b{i}" for i in range(6)
}


@dataclass(frozen=True)
class Entry:
    """One file of the zoo."""

    file: str  # below the repository
    model: str
    url: str
    page: str  # for a person with a browser


def find_entries() -> dict[str, Entry]:
    """The whole zoo, by the files' names without their endings."""
    entries = []
    for i in range(6):
        url = f"https://huggingface.co/nvidia/mit-b{i}/resolve/main/pytorch_model.bin"
        entries.append(Entry(f"ckpt_pretrained/mit_b{i}.pth", f"segformer_b{i}", url, MIT_PAGE))
    for i in range(6):
        url = f"https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b{i}.pth"
        entries.append(Entry(f"ckpt_pretrained/pvt_v2_b{i}.pth", f"pvt_v2_b{i}", url, url))
    for file, drive_id in RELEASED.items():
        model = "pvt_v2_b2" if file.startswith("pvt") else f"segformer_{file[9:11]}"
        url = f"https://drive.google.com/uc?id={drive_id}"
        entries.append(Entry(f"outputs/{file}", model, url, RELEASE_PAGE))
    return {Path(entry.file).stem: entry for entry in entries}


ZOO = find_entries()


def download_advice(name: str) -> str:
    """The beginning of an advice: the command that brings these weights, if the zoo has them."""
    return f"python -m models.zoo download {name}, or " if name in ZOO else ""


@dataclass
class Options:
    """List the public weights, or download some of them."""

    action: Annotated[Literal["list", "download"], tyro.conf.Positional]
    """What to do."""
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which to download, by the names that `list` shows."""
    to: Path | None = None
    """The folder for downloads. Default: ckpt_pretrained/ and outputs/, where the scripts look."""


def main(options: Options) -> None:
    if options.action == "list":
        for name, entry in ZOO.items():
            here = " (here)" if (ROOT / entry.file).exists() else ""
            print(f"{name:<52}{entry.model:<14}{entry.file}{here}")
        for name, model in HUB_TEACHERS.items():
            print(f"{name:<52}{model:<14}hub")
        print("MiT's weights, and what was trained from them, are for research alone.")
        return
    if not options.names or not ZOO.keys() >= set(options.names):
        raise UserError("name what to download as `python -m models.zoo list` does")
    for name in options.names:
        path = ROOT / ZOO[name].file
        if options.to is not None:
            path = options.to.expanduser() / path.name
        if path.exists():
            print(f"{path} is there already")
        else:
            download(name, ZOO[name], path)
            print(f"{path}: {ZOO[name].model}, {path.stat().st_size / 1e6:.1f} MB")


def download(name: str, entry: Entry, path: Path) -> None:
    """Fetch a file, continuing what an earlier try left, and name it when it is found right.

    Raises UserError if gdown is missing, the host can't be reached, or something else came.
    """
    require("gdown", "gdown==6.5.1")
    import gdown

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.download")
    try:
        gdown.download(entry.url, str(aside), resume=True, timeout=30.0)
        if entry.file.startswith("ckpt_pretrained/"):
            start_from(create_model(entry.model), aside)
        else:
            model = load_model(aside)
            if (model.name, model.num_classes) != (entry.model, CITYSCAPES.num_outputs):
                raise ValueError(f"it is a {model.name} with {model.num_classes} classes")
    except (gdown.exceptions.DownloadError, OSError, ValueError, UserError) as error:
        aside.unlink(missing_ok=True)  # what broke off is in other files, which gdown continues
        reason = " ".join(str(error).split())
        raise UserError(
            f"{entry.url} gave no {name} ({reason}); try again, without {aside}* if that fails, "
            f"or open {entry.page} in a browser and save the file as {path}"
        ) from error
    aside.chmod(0o644)  # gdown's files are for their owner alone
    aside.replace(path)


if __name__ == "__main__":
    cli.run(main, Options)
