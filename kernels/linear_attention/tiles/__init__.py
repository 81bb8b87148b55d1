"""Linear attention in Triton: training and prefill."""
