"""The zoo's downloads, from a server on this machine that breaks off, lies and refuses."""

import re
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from errors import UserError
from models import create_model, zoo
from models.zoo import ZOO, Options, main
from tests.conftest import Command
from tests.golden_data import seed

STUDENT = "segformerb0_TransKDBase_cityscapes"


class Server(ThreadingHTTPServer):
    """Serves `files` by name, with ranges; a file in `breaks` ends after so many bytes, once."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.breaks: dict[str, int] = {}
        self.asked: list[tuple[str, int]] = []  # file, first byte
        self.ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.strip("/")
        content = self.server.files.get(name)
        if content is None:
            self.send_error(404)
            return
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.server.asked.append((name, start))
        if not self.server.ranges:
            asked, start = None, 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        with suppress(ConnectionError):  # the client hangs up, to ask again for a range
            self.wfile.write(content[start:][: self.server.breaks.pop(name, None)])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A distilled checkpoint as published."""
    path = tmp_path_factory.mktemp("released") / "student.pth"
    torch.save(
        {
            f"student.{key}": value
            for key, value in seed(create_model("segformer_b0")).state_dict().items()
        },
        path,
    )
    return path.read_bytes()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(server: Server, folder: Path, *names: str) -> None:
    main(Options("download", names, to=folder, mirror=server.url))


def test_a_broken_download_goes_on(
    server: Server,
    student: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(zoo, "RETRIES", 0)
    server.files[f"{STUDENT}.pth"] = student
    server.breaks[f"{STUDENT}.pth"] = 1_000_000
    with pytest.raises(
        UserError, match=r"can't fetch .*try again, or open .* in a browser and save the file as"
    ):
        fetch(server, tmp_path, STUDENT)
    path = tmp_path / f"{STUDENT}.pth"
    assert not path.exists()
    fetch(server, tmp_path, STUDENT)
    assert path.read_bytes() == student
    assert 0 < server.asked[-1][1] <= 1_000_000  # the rest alone was sent again
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert f"{path}: segformer_b0" in capsys.readouterr().out
    count = len(server.asked)
    fetch(server, tmp_path, f"{STUDENT}.pth")
    assert "is there already" in capsys.readouterr().out and len(server.asked) == count


@pytest.mark.parametrize(
    "kept", [[1000], [50_000_000], [5, 6]], ids=["no ranges", "too long", "twice"]
)
def test_parts_of_no_use_are_fetched_anew(
    kept: list[int], server: Server, student: bytes, tmp_path: Path
) -> None:
    """The server ignores ranges, or what was kept is no beginning of the file."""
    server.files[f"{STUDENT}.pth"], server.ranges = student, kept != [1000]
    for i, size in enumerate(kept):
        with (tmp_path / f".{STUDENT}.pth.download{i:08}.part").open("wb") as part:
            part.truncate(size)
    fetch(server, tmp_path, STUDENT)
    assert [file.name for file in tmp_path.iterdir()] == [f"{STUDENT}.pth"]


def test_a_damaged_file_that_is_there_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mit_b0.pth").write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"mit_b0\.pth is there already but not right .*; remove it"
    ):
        fetch(server, tmp_path, "mit_b0")
    assert not server.asked


def test_an_encoder_is_checked_as_one(server: Server, tmp_path: Path) -> None:
    """MiT as the hub has it: another library's names, and a classifier."""
    from models.layouts.huggingface import to_huggingface

    state = {
        k: v
        for k, v in create_model("segformer_b0").state_dict().items()
        if not k.startswith("linear_")
    }
    torch.save(
        to_huggingface(state | {"head.weight": torch.zeros(9, 256), "head.bias": torch.zeros(9)}),
        tmp_path / "w",
    )
    server.files["mit_b0.pth"] = server.files["mit_b1.pth"] = (tmp_path / "w").read_bytes()
    folder = tmp_path / "new" / "ckpt"
    fetch(server, folder, "mit_b0")
    assert [file.name for file in folder.iterdir()] == ["mit_b0.pth"]
    with pytest.raises(UserError, match=r"is not mit_b1 .*it looks like segformer_b0"):
        fetch(server, folder, "mit_b1")
    assert [file.name for file in folder.iterdir()] == ["mit_b0.pth"]


def test_what_is_no_network_is_not_placed(server: Server, student: bytes, tmp_path: Path) -> None:
    """A page instead of a file, the tail lost, another architecture, nothing at all."""
    for content, says in (
        (b"<html>quota exceeded</html>", "can't be read as weights"),
        (student[:-1000], "can't be read as weights"),
    ):
        server.files[f"{STUDENT}.pth"] = content
        with pytest.raises(UserError, match=says) as error:
            fetch(server, tmp_path, STUDENT)
        assert "\n" not in str(error.value)
    server.files["segformerb2_teacher_acdc.pth"] = student
    with pytest.raises(UserError, match="holds a segformer_b0 with 20 classes, not a segformer_b2"):
        fetch(server, tmp_path, "segformerb2_teacher_acdc")
    with pytest.raises(UserError, match="404"):
        fetch(server, tmp_path, "mit_b5")
    assert not list(tmp_path.iterdir())


def test_no_host(tmp_path: Path) -> None:
    server = Server()
    server.server_close()
    with pytest.raises(
        UserError, match=r"127\.0\.0\.1:\d+ can't be reached\); try again, or open https://"
    ) as error:
        fetch(server, tmp_path, STUDENT)
    assert "\n" not in str(error.value)


def test_list_and_names(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    main(Options("list"))
    listed = capsys.readouterr().out
    assert all(name in listed for name in ZOO)
    main(Options("list", ("mit_b2", "pvtv2b2_teacher_cityscapes.th")))
    listed = capsys.readouterr().out
    firsts = {line.split()[1] for line in listed.splitlines() if len(line.split()) > 2}
    assert firsts & ZOO.keys() == {"mit_b2", "pvtv2b2_teacher_cityscapes"}
    with pytest.raises(UserError, match="perhaps mit_b2"):
        main(Options("list", ("mitb2",)))
    with pytest.raises(UserError, match="--mirror nonsense is no URL"):
        main(Options("download", ("mit_b2",), to=Path("nowhere"), mirror="nonsense"))
    for flags in ({"to": Path("nowhere")}, {"mirror": "http://host"}):
        with pytest.raises(UserError, match="are for download"):
            main(Options("list", **flags))
    with pytest.raises(UserError, match="is no URL"):
        main(Options("download", ("mit_b2",), to=Path("nowhere"), mirror="http://[::1"))
    done = command("-m", "models.zoo", "download", "mitb2", "--to", "nowhere")
    assert done.returncode == 2 and "perhaps mit_b2" in done.stderr


def test_published_names_and_places() -> None:
    """The scripts look for these files without being told."""
    assert len(ZOO) == 6 + 6 + 11
    assert ZOO["mit_b2"].file == "ckpt_pretrained/mit_b2.pth"
    for dataset in ("cityscapes", "acdc"):
        for kind in ("student", "TransKDBase", "TransKD_GL", "TransKD_EA"):
            assert (
                ZOO[f"segformerb0_{kind}_{dataset}"].file
                == f"outputs/segformerb0_{kind}_{dataset}.pth"
            )
    assert len({weights.url for weights in ZOO.values()}) == len(ZOO)
