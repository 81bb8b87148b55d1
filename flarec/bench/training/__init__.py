"""Optimizer steps of a model with random weights: stock fine-tuning, and flarec's recipes beside it."""
