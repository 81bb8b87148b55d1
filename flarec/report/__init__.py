"""One page about a checkpoint: how it was trained, what was measured, and what it writes."""

from .page import to_html, to_markdown
from .recorded import Evaluation, Recorded, read_evaluations, read_recorded
from .samples import Sample, samples_of
from .sections import sections

__all__ = [
    "Evaluation", "Recorded", "Sample", "read_evaluations", "read_recorded", "samples_of", "sections", "to_html",
    "to_markdown",
]
