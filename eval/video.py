"""Videos, frame by frame, through PyAV (requirements/video.txt)."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.video.reformatter import Colorspace
from PIL import Image

from errors import UserError
from files import atomic_write

log = logging.getLogger(__name__)


class Video:
    """A video file to read; `stream` is PyAV's video stream of it.

    Raises UserError if the file can't be read, or has no video in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            container = av.open(str(path), metadata_errors="replace")
        except av.FFmpegError as error:
            raise self.unreadable(error.strerror) from error
        if not container.streams.video:
            raise self.unreadable("there is no video in it")
        self.stream: Any = container.streams.video[0]
        self.stream.thread_type = "AUTO"
        self.turned = False  # by a quarter, as phones are held

    def unreadable(self, reason: str | None) -> UserError:
        return UserError(f"{self.path} can't be read as a video: {reason}")

    def frames(self) -> Iterator[tuple[int, Image.Image]]:
        """Upright RGB pictures, and when each is shown, in units of the stream's `time_base`.

        A packet that can't be decoded is skipped, with a warning at the end. Raises UserError if
        the file ends unexpectedly, or holds no frame at all.
        """
        broken = 0
        last = -1
        try:
            for packet in self.stream.container.demux(self.stream):
                try:
                    decoded = packet.decode()
                except av.error.InvalidDataError:
                    broken += 1
                    continue
                for frame in decoded:
                    picture = frame.to_image()
                    self.turned = frame.rotation % 180 != 0
                    if frame.rotation:
                        picture = picture.rotate(frame.rotation, expand=True)
                    last = max(last + 1, (frame.pts or 0) - (self.stream.start_time or 0))
                    yield last, picture
        except av.FFmpegError as error:
            raise self.unreadable(error.strerror) from error
        if last < 0:
            raise self.unreadable("there is no frame in it")
        if broken:
            log.warning("%s: packets that can't be decoded and are skipped: %d", self.path, broken)


@contextmanager
def writing_video(path: Path, video: Video) -> Iterator[Callable[[Image.Image, int], None]]:
    """Write an MP4 file (H.264), which has its name only when the block ends without an error.

    Frame rate, unit of time and shape of the pixels are those of `video`. Yields a function that
    adds a picture, to be shown at a time in units of the video's `time_base`. The size is that of
    the first picture; an odd side keeps full colour resolution, which not every player shows.
    Raises UserError if the file can't be written.
    """
    source = video.stream
    stream: Any = None

    def add(picture: Image.Image, time: int) -> None:
        nonlocal stream
        if stream is None:
            rate = source.average_rate or source.guessed_rate or 25
            stream = container.add_stream("libx264", rate, {"crf": "18"})
            stream.width, stream.height = picture.size
            even = picture.width % 2 == picture.height % 2 == 0
            stream.pix_fmt = "yuv420p" if even else "yuv444p"
            stream.codec_context.time_base = source.time_base
            shape = Fraction(source.sample_aspect_ratio or 1)
            stream.codec_context.sample_aspect_ratio = 1 / shape if video.turned else shape
            stream.codec_context.colorspace = Colorspace.ITU601  # by which PyAV converts
        frame = av.VideoFrame.from_image(picture)
        frame.pts = time
        frame.time_base = source.time_base
        container.mux(stream.encode(frame))

    with atomic_write(path) as temporary:
        try:
            with av.open(str(temporary), "w", format="mp4") as container:
                yield add
                if stream is not None:
                    container.mux(stream.encode(None))  # what the encoder still holds
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from error
