"""Models of the flash-linear-attention library."""
