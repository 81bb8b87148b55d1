"""Linear attention with a decayed matrix state: `reference` (specification), the state schedule, and the fast form."""

from .commit import commit
from .reference import reference, reference_states
from .schedule import StateSchedule
from .torch_chunk import two_stream, two_stream_step

__all__ = ["StateSchedule", "commit", "reference", "reference_states", "two_stream", "two_stream_step"]
