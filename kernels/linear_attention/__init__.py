"""Linear attention with a decayed matrix state: `reference` (specification), the state schedule, and the fast form."""

from .panels.chunk import two_stream, two_stream_step
from .panels.commit import commit
from .panels.schedule import StateSchedule
from .reference import reference, reference_states

__all__ = ["StateSchedule", "commit", "reference", "reference_states", "two_stream", "two_stream_step"]
