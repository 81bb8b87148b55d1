"""What a model needs to be converted and served, told from its configuration alone.

The model is captured and lowered on the meta device, then one training step and the steps of decoding are run without
numbers: memory is what would live at the worst moment, time is the counted work at rates measured here.
"""

from .diagnosis import diagnose
from .report import Anatomy, DataReport, Memory, Rates, Report, SiteKind, Speed

__all__ = ["Anatomy", "DataReport", "Memory", "Rates", "Report", "SiteKind", "Speed", "diagnose"]
