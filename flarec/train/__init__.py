"""Conversion: data, noise, objective, the training loop, and `convert` itself."""
