"""Pictures as files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.files import write_file
from ..errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]
FORMATS = (
    "svg", "svgz", "pdf", "png", "jpg", "jpeg", "tif", "tiff", "webp", "gif", "avif", "eps", "ps", "raw", "rgba",
)
"""Suffixes of pictures: what matplotlib writes, but for pgf, which needs LaTeX."""


def check_picture(out: Path) -> None:
    """Raise `UsageError` for a suffix that no format of pictures has."""
    from matplotlib.backend_bases import FigureCanvasBase

    kind = out.suffix.removeprefix(".")
    there = [name for name in FORMATS if name in FigureCanvasBase.get_supported_filetypes()]
    if kind and kind not in there:
        raise UsageError(f"{out} cannot be written (there is no picture {kind!r}); give {', '.join(there)}")


def write_figure(figure: Figure, out: Path) -> None:
    """The suffix of `out` chooses the format; equal figures give equal files. Raises `UsageError`."""
    from matplotlib import rc_context

    check_picture(out)
    drawn, kind = BytesIO(), out.suffix.removeprefix(".")
    try:
        with rc_context({"svg.hashsalt": "flarec"}):
            figure.savefig(drawn, format=kind or "png", metadata={"Date": None} if kind == "svg" else None)
    except ValueError as error:
        raise UsageError(f"{out} cannot be written ({error}); choose another file") from None
    write_file(out, drawn.getvalue())
