"""Training on several ranks: one process per device, joined by torch.distributed."""
