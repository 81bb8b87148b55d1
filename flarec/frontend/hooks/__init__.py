"""What stands in for a model's token mixers while it is traced."""
