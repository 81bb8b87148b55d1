"""The three ways to decode: causal, AR-Trust, Diffusion-Trust."""
