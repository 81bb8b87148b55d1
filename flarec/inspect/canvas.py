"""The few SVG elements that the drawings need, written by hand."""

from __future__ import annotations

from html import escape

FONT = "font-family='ui-sans-serif, system-ui, Helvetica, Arial, sans-serif'"


class Canvas:
    """Collects SVG elements; coordinates in pixels, y downwards. `offset` moves what is drawn next."""

    def __init__(self) -> None:
        self.elements: list[str] = []
        self.offset = (0.0, 0.0)
        self.extent = [0.0, 0.0]

    def _place(self, x: float, y: float) -> tuple[float, float]:
        x, y = x + self.offset[0], y + self.offset[1]
        self.extent = [max(self.extent[0], x), max(self.extent[1], y)]
        return x, y

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        stroke: str = "none",
        radius: float = 0,
        title: str = "",
    ) -> None:
        self._place(x + width, y + height)
        left, top = self._place(x, y)
        tip = f"<title>{escape(title)}</title>" if title else ""
        self.elements.append(
            f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'fill="{fill}" stroke="{stroke}">{tip}</rect>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        fill: str = "#1f2933",
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """`y` is the baseline; `anchor` is start, middle or end."""
        width = 0.6 * size * len(text)
        self._place(x + {"start": width, "middle": width / 2, "end": 0}[anchor], y)
        left, top = self._place(x, y)
        weight = ' font-weight="600"' if bold else ""
        self.elements.append(
            f'<text x="{left:g}" y="{top:g}" font-size="{size:g}" fill="{fill}" text-anchor="{anchor}"{weight}>'
            f"{escape(text)}</text>"
        )

    def line(
        self,
        x1: float,
        y1: float,
        x2: float,
        y2: float,
        stroke: str,
        *,
        width: float = 1,
        dash: str = "",
        arrow: bool = False,
    ) -> None:
        (a, b), (c, d) = self._place(x1, y1), self._place(x2, y2)
        extra = (f' stroke-dasharray="{dash}"' if dash else "") + (' marker-end="url(#arrow)"' if arrow else "")
        self.elements.append(
            f'<line x1="{a:g}" y1="{b:g}" x2="{c:g}" y2="{d:g}" stroke="{stroke}" stroke-width="{width:g}"{extra}/>'
        )

    def document(self, margin: float = 24) -> str:
        """The finished SVG, as large as what was drawn."""
        width, height = (int(value + margin) + 1 for value in self.extent)
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" {FONT}>',
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M0 0 L8 4 L0 8 z" fill="#52606d"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *self.elements,
            "</svg>",
        ])
