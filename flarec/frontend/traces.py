"""Where in the model's code a node was made: what the tracer keeps of the call stack, collected cheaply.

At every node torch symbolizes the whole stack, some ninety frames, reads the source line of each, and then keeps those
of functions called `forward`. That is a sixth of the time of a capture.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from types import FrameType

import torch.fx.proxy


class Trace:
    """The call stack at a node; lines of source are read when somebody formats it (what torch's own does at once)."""

    def __init__(self, innermost: FrameType) -> None:
        self._frames = list(traceback.walk_stack(innermost))

    @classmethod
    def extract(cls) -> Trace:
        return cls(sys._getframe(1))

    def summary(self) -> traceback.StackSummary:
        """The outermost frame first, as in torch's `CapturedTraceback`."""
        return traceback.StackSummary.from_list(
            [
                traceback.FrameSummary(frame.f_code.co_filename, line, frame.f_code.co_name, lookup_line=False)
                for frame, line in reversed(self._frames)
            ]
        )


@contextlib.contextmanager
def traces_of_forwards() -> Iterator[None]:
    """Within the context tracers of torch note where a node was made through `Trace`."""
    own = getattr(torch.fx.proxy, "CapturedTraceback", None)
    if own is None:  # a torch that does it otherwise, in its own time
        yield
        return
    setattr(torch.fx.proxy, "CapturedTraceback", Trace)  # noqa: B010 - no attribute that torch states
    try:
        yield
    finally:
        setattr(torch.fx.proxy, "CapturedTraceback", own)  # noqa: B010
