"""Live plots in visdom, as the published scripts have them (`--visualize --port 8097`), and files for TensorBoard.

visdom needs its package (requirements-dev.txt pins it) and a running server, `python -m visdom.server -bind_local`.
A training never fails because a dashboard does.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError

SECONDS = 10.0
"""A visdom server that takes longer to answer is taken for dead."""


class Expendable:
    """Something that a training can do without: its first failure is one warning, and then its methods do nothing."""

    def __init__(self, trouble: str, make: Callable[[], Any]) -> None:
        self._trouble = trouble
        self._target: Any = self._attempt(make)

    def __getattr__(self, method: str) -> Callable[..., None]:
        def call(*arguments: Any, **named: Any) -> None:
            if self._target is not None:
                self._attempt(lambda: getattr(self._target, method)(*arguments, **named))

        return call

    def _attempt(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:
            self._target = None
            reason = getattr(error, "strerror", None) or type(error).__name__
            print(
                f"warning: {self._trouble} ({reason}); training goes on without it",
                file=sys.stderr,
                flush=True,
            )
            return None


def tensorboard_writer(folder: Path, purge_step: int) -> Expendable:
    """A SummaryWriter into `folder`; what it held from `purge_step` on is dropped."""

    def make() -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=purge_step)

    return Expendable(f"can't write TensorBoard's files to {folder}", make)


class Dashboard:
    """Named windows of one visdom environment: the losses, val mIoU, and input, prediction and target pictures.

    Raises:
        UserError: the visdom package is not installed.
    """

    def __init__(self, environment: str, port: int) -> None:
        try:
            import visdom
        except ImportError as error:
            raise UserError(
                "--visualize needs visdom; install it by PIP_CONSTRAINT=constraints.txt pip install visdom==0.2.4"
            ) from error
        logging.getLogger("visdom").setLevel(
            logging.CRITICAL
        )  # it logs a traceback for every lost message
        logging.getLogger("websocket").setLevel(logging.CRITICAL)

        class Client(visdom.Visdom):
            session: Any  # visdom's stubs leave it out

            def _handle_post(self, url: str, data: Any = None) -> str:
                return self.session.post(
                    url, data=data, timeout=SECONDS
                ).text  # visdom itself waits for ever

        self.client = Expendable(
            f"no visdom server answers on port {port}",
            lambda: Client(
                server="http://127.0.0.1",
                port=port,
                env=environment,
                raise_exceptions=True,
                use_incoming_socket=False,
            ),
        )

    def curve(self, window: str, name: str, step: int, value: float) -> None:
        """One more point of a curve."""
        self.client.line(
            Y=[value], X=[step], win=window, name=name, update="append", opts=_titled(window)
        )

    def picture(self, window: str, image: np.ndarray) -> None:
        """Show (H, W, 3) uint8."""
        self.client.image(img=image.transpose(2, 0, 1), win=window, opts=_titled(window))


def _titled(window: str) -> dict[str, Any]:
    return {"title": window, "showlegend": True}
