"""Look at a program: what it is made of, layer by layer, and what each pass changed (text, JSON, SVG)."""


from .open import open_program
from .summary import Group, Mixer, Part, Summary, summarize
from .text import as_text

__all__ = ["Group", "Mixer", "Part", "Summary", "as_text", "open_program", "summarize"]
