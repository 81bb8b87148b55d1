"""Linear attention with a diagonal plus rank-one transition (RWKV-7): `reference` is the specification."""

from .reference import reference

__all__ = ["reference"]
