"""Look at a program: what it is made of, layer by layer, and what each pass changed (text, JSON, SVG)."""

from .drawing import as_svg, example_layout
from .open import open_program
from .summary import Group, MixerSite, Part, Summary, summarize
from .text import as_text

__all__ = ["Group", "MixerSite", "Part", "Summary", "as_svg", "as_text", "example_layout", "open_program", "summarize"]
