"""Noise, batches with noisy blocks, and the losses."""
