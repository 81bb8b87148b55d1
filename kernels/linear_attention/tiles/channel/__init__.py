"""Key-channel gates (KDA) in Triton."""
