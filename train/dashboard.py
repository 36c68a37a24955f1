"""Live plots in visdom, as the published scripts have them: `--visualize --port 8097`.

Needs the visdom package (requirements-dev.txt pins it) and a running server, `python -m visdom.server -bind_local`.
A training never fails because a dashboard does.
"""

import logging
from typing import Any

import numpy as np

from cli import UserError


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
        logging.getLogger("visdom").setLevel(logging.CRITICAL)  # it logs a traceback for every lost message
        logging.getLogger("websocket").setLevel(logging.CRITICAL)
        self.client: Any = None
        try:
            self.client = visdom.Visdom(
                server="http://127.0.0.1",
                port=port,
                env=environment,
                raise_exceptions=True,
                use_incoming_socket=False,
            )
        except Exception as error:
            self._give_up(error, port)

    def curve(self, window: str, name: str, step: int, value: float) -> None:
        """One more point of a curve."""
        self._send("line", Y=[value], X=[step], win=window, name=name, update="append", opts=_titled(window))

    def picture(self, window: str, image: np.ndarray) -> None:
        """Show (H, W, 3) uint8."""
        self._send("image", img=image.transpose(2, 0, 1), win=window, opts=_titled(window))

    def _send(self, kind: str, **content: Any) -> None:
        if self.client is None:
            return
        try:
            getattr(self.client, kind)(**content)
        except Exception as error:
            self._give_up(error, self.client.port)

    def _give_up(self, error: Exception, port: int) -> None:
        self.client = None
        reason = type(error).__name__
        print(f"warning: no visdom server answers on port {port} ({reason}); training goes on without it", flush=True)


def _titled(window: str) -> dict[str, Any]:
    return {"title": window, "showlegend": True}
