"""Decoding: causal, AR-Trust and Diffusion-Trust generation on one lowered decode program."""

from .cache import Cache
from .engine import MODES, Engine
from .plan import DecodeProgram
from .request import Generation
from .sampling import SamplingParams
from .text import StopStrings, TextStream

__all__ = ["MODES", "Cache", "DecodeProgram", "Engine", "Generation", "SamplingParams", "StopStrings", "TextStream"]
