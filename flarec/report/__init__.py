"""One page about a checkpoint: how it was trained, what was measured, and what it writes."""

from .chapters import chapters
from .page import to_html, to_markdown
from .recorded import EvaluationRecord, Recorded, read_evaluations, read_recorded
from .samples import Sample, samples_of

__all__ = [
    "EvaluationRecord",
    "Recorded",
    "Sample",
    "chapters",
    "read_evaluations",
    "read_recorded",
    "samples_of",
    "to_html",
    "to_markdown",
]
