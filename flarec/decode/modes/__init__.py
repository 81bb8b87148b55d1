"""The ways to decode: causal, AR-Trust, Diffusion-Trust, elastic."""
