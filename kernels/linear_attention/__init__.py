"""Linear attention with a decayed matrix state: `reference` is the specification, the folders are its fast forms."""

from .reference import reference, reference_states

__all__ = ["reference", "reference_states"]
