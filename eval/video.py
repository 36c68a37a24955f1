"""Videos, frame by frame, through PyAV (requirements-video.txt)."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from errors import UserError
from files import atomic_write, make_folder

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")


class UnreadableError(Exception):
    """A file that is no video, or a damaged one."""


class Video:
    """A video's `rate` in frames a second and its `frames()`; None where the file doesn't say, their `count`, and
    `about`, what to expect.

    Raises:
        UserError: PyAV is not installed.
        UnreadableError: the file can't be read as a video.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as stream:
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self.count: int | None = stream.frames or None
            duration = (stream.container.duration or 0) / 1_000_000  # in microseconds
            self.about = self.count or round(duration * self.rate) or None

    def frames(self) -> Iterator[Image.Image]:
        """RGB pictures as a player shows them, upright. Raises UnreadableError where they can't be read."""
        with self._open() as stream:
            for frame in stream.container.decode(stream):
                image = frame.to_image()
                yield image.rotate(frame.rotation, expand=True) if frame.rotation else image

    @contextmanager
    def _open(self) -> Iterator[Any]:
        av = import_av()
        try:
            with av.open(
                str(self.path), metadata_errors="replace"
            ) as container:  # titles in any encoding
                if not container.streams.video:
                    raise UnreadableError("no video in it")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                yield stream
        except av.FFmpegError as error:
            raise UnreadableError(error.strerror) from error


class VideoFile:
    """An MP4 file (H.264) that grows by `add`; its size is that of the first picture.

    A picture with an odd side keeps it, with full colour resolution, which not every player shows.
    """

    def __init__(self, container: Any, rate: Fraction) -> None:
        self._container, self._rate = container, rate
        self._stream: Any = None

    def add(self, picture: Image.Image) -> None:
        if self._stream is None:
            self._stream = self._container.add_stream(
                "libx264", rate=self._rate, options={"crf": "18"}
            )
            self._stream.width, self._stream.height = picture.size
            even = picture.width % 2 == picture.height % 2 == 0
            self._stream.pix_fmt = "yuv420p" if even else "yuv444p"
        frame = import_av().VideoFrame.from_image(picture.convert("RGB"))
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))


@contextmanager
def writing_video(path: Path, rate: Fraction) -> Iterator[VideoFile]:
    """A video that has its name only when the block ends well.

    Raises:
        UserError: it can't be written.
    """
    make_folder(path.parent)
    av = import_av()
    with atomic_write(path) as aside:
        try:
            with av.open(str(aside), "w", format="mp4") as container:
                file = VideoFile(container, rate)
                yield file
                file.finish()
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from error


def import_av() -> Any:
    """The av package. Raises UserError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            "videos need PyAV; install it by pip install -r requirements-video.txt"
        ) from error
    return av
