"""Linear attention in Triton: one decode step."""
