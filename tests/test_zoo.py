"""The zoo's downloads, from a server on this machine that breaks off, lies and refuses."""

import stat
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch

from errors import UserError
from models import create_model
from models.zoo import HUB_TEACHERS, ZOO, Options, main
from tests.server import Server, serving

STUDENT = "segformerb0_TransKDBase_cityscapes"
FILE = f"{STUDENT}.pth"


def saved(state: dict[str, torch.Tensor]) -> bytes:
    file = BytesIO()
    torch.save(state, file)
    return file.getvalue()


NETWORK = create_model("segformer_b0").state_dict()
RELEASED = saved({f"student.{key}": value for key, value in NETWORK.items()})
ENCODER = saved({key: x for key, x in NETWORK.items() if not key.startswith("linear_")})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """It has the whole zoo at its top."""
    with serving() as server:
        for name, entry in ZOO.items():
            url = f"{server.url}/{Path(entry.file).name}"
            monkeypatch.setitem(ZOO, name, replace(entry, url=url))
        yield server


def fetch(folder: Path, *names: str) -> None:
    main(Options("download", names, to=folder))


def test_a_broken_download_is_continued(server: Server, tmp_path: Path) -> None:
    server.files[FILE] = RELEASED
    server.breaks[FILE] = 1_000_000
    with pytest.raises(UserError, match=f"gave no {STUDENT} .*incomplete.*; try again"):
        fetch(tmp_path, STUDENT)
    assert not (tmp_path / FILE).exists()
    server.breaks.clear()
    fetch(tmp_path, STUDENT)
    (path,) = tmp_path.iterdir()
    assert path.name == FILE and path.read_bytes() == RELEASED
    assert 0 < server.asked[-1][1] <= 1_000_000  # the rest alone was sent again
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    count = len(server.asked)
    fetch(tmp_path, STUDENT)
    assert len(server.asked) == count  # it is there already


def test_an_encoder_is_checked_as_one(server: Server, tmp_path: Path) -> None:
    server.files["mit_b0.pth"] = ENCODER
    folder = tmp_path / "new" / "ckpt"
    fetch(folder, "mit_b0")
    assert [file.name for file in folder.iterdir()] == ["mit_b0.pth"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (STUDENT, b"<html>quota exceeded</html>", "can't be read as weights"),
        ("segformerb2_teacher_acdc", RELEASED, "it is a segformer_b0 with 20 classes"),
        ("mit_b1", ENCODER, r"gave no mit_b1 .*it looks like segformer_b0"),
        ("mit_b5", b"", r"404.*try again, .* open https://.* in a browser and save the file as"),
        ("mitb2", b"", r"as `python -m models\.zoo list` does"),
    ],
    ids=["page", "another network", "another encoder", "nothing", "no such name"],
)
def test_what_is_no_such_network_is_not_placed(name, content, says, server, tmp_path) -> None:
    if content:
        server.files[f"{name}.pth"] = content
    with pytest.raises(UserError, match=says) as error:
        fetch(tmp_path, name)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    main(Options("list"))
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*ZOO, *HUB_TEACHERS))
    assert len({weights.url for weights in ZOO.values()}) == len(ZOO) == 6 + 6 + 11
    assert ZOO["mit_b2"].file == "ckpt_pretrained/mit_b2.pth"
