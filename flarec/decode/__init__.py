"""Decoding: causal, AR-Trust and Diffusion-Trust generation on one lowered decode program."""

from .cache import Cache
from .engine import Engine
from .plan import DecodeProgram
from .request import Generation
from .stepper import BlockSpec, Stepper
from .text import TextStream

__all__ = ["BlockSpec", "Cache", "DecodeProgram", "Engine", "Generation", "Stepper", "TextStream"]
