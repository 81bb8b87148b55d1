"""Softmax attention in Triton: one decode step over a cache that is read where it lies."""
