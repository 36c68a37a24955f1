"""The zoo's downloads, from a server on this machine that breaks off, lies and refuses."""

import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from errors import UserError
from models import create_model
from models.layouts.huggingface import to_huggingface
from models.zoo import HUB_TEACHERS, ZOO, Options, main
from tests.golden_data import seed
from tests.server import Server, serving

STUDENT = "segformerb0_TransKDBase_cityscapes"
FILE = f"{STUDENT}.pth"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A distilled checkpoint as published."""
    path = tmp_path_factory.mktemp("released") / "student.pth"
    state = seed(create_model("segformer_b0")).state_dict()
    torch.save({f"student.{key}": value for key, value in state.items()}, path)
    return path.read_bytes()


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


def test_a_broken_download_is_continued(server: Server, student: bytes, tmp_path: Path) -> None:
    server.files[FILE] = student
    server.breaks[FILE] = 1_000_000
    with pytest.raises(UserError, match=f"gave no {STUDENT} .*incomplete.*; try again"):
        fetch(tmp_path, STUDENT)
    assert not (tmp_path / FILE).exists()
    fetch(tmp_path, STUDENT)
    (path,) = tmp_path.iterdir()
    assert path.name == FILE and path.read_bytes() == student
    assert 0 < server.asked[-1][1] <= 1_000_000  # the rest alone was sent again
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    count = len(server.asked)
    fetch(tmp_path, STUDENT)
    assert len(server.asked) == count  # it is there already


def test_an_encoder_is_checked_as_one(server: Server, tmp_path: Path) -> None:
    """MiT as the hub has it: another library's names, and a classifier."""
    state = create_model("segformer_b0").state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("linear_")}
    head = {"head.weight": torch.zeros(9, 256), "head.bias": torch.zeros(9)}
    torch.save(to_huggingface(state | head), tmp_path / "w")
    server.files["mit_b0.pth"] = server.files["mit_b1.pth"] = (tmp_path / "w").read_bytes()
    folder = tmp_path / "new" / "ckpt"
    fetch(folder, "mit_b0")
    with pytest.raises(UserError, match=r"gave no mit_b1 .*it looks like segformer_b0"):
        fetch(folder, "mit_b1")
    assert [file.name for file in folder.iterdir()] == ["mit_b0.pth"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (STUDENT, b"<html>quota exceeded</html>", "can't be read as weights"),
        ("segformerb2_teacher_acdc", None, "it is a segformer_b0 with 20 classes"),
        ("mit_b5", b"", r"404.*try again, .* open https://.* in a browser and save the file as"),
        ("mitb2", b"", r"as `python -m models\.zoo list` does"),
    ],
    ids=["page", "another network", "nothing", "no such name"],
)
def test_what_is_no_such_network_is_not_placed(
    name: str, content: bytes | None, says: str, server: Server, student: bytes, tmp_path: Path
) -> None:
    if content != b"":
        server.files[f"{name}.pth"] = content or student
    with pytest.raises(UserError, match=says) as error:
        fetch(tmp_path, name)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    server.server_close()
    monkeypatch.setitem(ZOO, STUDENT, replace(ZOO[STUDENT], url=server.url))
    with pytest.raises(UserError, match=rf"gave no {STUDENT} .*; try again"):
        fetch(tmp_path, STUDENT)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """What there is, and where the scripts look for it without being told."""
    main(Options("list"))
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*ZOO, *HUB_TEACHERS))
    assert len({weights.url for weights in ZOO.values()}) == len(ZOO) == 6 + 6 + 11
    assert ZOO["mit_b2"].file == "ckpt_pretrained/mit_b2.pth"
    assert ZOO[STUDENT].file == f"outputs/{STUDENT}.pth"
