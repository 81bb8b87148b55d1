"""Linear attention with a decayed matrix state: `reference` (specification) and the state schedule of a layout."""

from .reference import reference, reference_states
from .schedule import StateSchedule

__all__ = ["StateSchedule", "reference", "reference_states"]
