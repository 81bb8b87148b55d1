"""Linear attention in PyTorch: chunks of clean tokens and panels of noisy rows."""
