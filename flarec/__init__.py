"""flarec: a compiler from hybrid-attention language models to dual-mode diffusion language models."""

__version__ = "0.1.0"
