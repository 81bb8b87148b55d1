"""Selective scan (Mamba-1): a diagonal state per channel with input-dependent step, input and output vectors."""
