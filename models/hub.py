"""The Hugging Face hub: its names in the place of paths, and uploads.

A name is `user/name` or `user/name@revision`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
WEIGHTS = (".safetensors", ".pth", ".pt", ".th", ".bin", ".onnx")  # endings of local files
FILES = ["*.json", "*.safetensors"]


def is_hub_name(source: Path | str) -> bool:
    """Whether there is no such file or folder, and the name has the form of the hub's."""
    path = Path(source)
    local = path.expanduser().exists() or path.suffix in WEIGHTS
    return not local and NAME.fullmatch(str(source)) is not None and not path.parent.is_dir()


def resolve(source: Path | str) -> Path:
    """A path as it is; or the folder of what the hub has by that name, downloaded once.

    Raises UserError if the hub can't be reached, or has nothing by that name that we may read.
    """
    if not is_hub_name(source):
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download

    name, _, revision = str(source).partition("@")
    revision = revision or "main"
    problem = f"{source} is no file here, and the Hugging Face hub gives none"
    with asking(problem):
        # What is in the usual cache already, and unchanged, is not fetched again.
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
        if not any(folder.glob("*.safetensors")):
            more = [*FILES, "pytorch_model.bin"]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=more))
    return folder


def upload(folder: Path, name: str) -> str:
    """Upload a folder as the repository `user/name`; returns its address.

    Raises UserError if the hub can't be reached, or doesn't let us.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with asking(f"{folder} is written, but the Hugging Face hub doesn't take it as {name}"):
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder))


@contextmanager
def asking(problem: str) -> Iterator[None]:
    """Raise UserError, which begins with `problem`, for what the hub or the network refuses."""
    import httpx2  # what huggingface_hub is made with

    try:
        yield
    except (httpx2.HTTPError, OSError, ValueError) as error:  # the library's own are kinds of these
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{problem} ({reason}); check the name, the connection, or `hf auth login`; the same "
            "command continues"
        ) from error
