"""`flarec train-head`: a small head on frozen weights that says how many drafts are safe."""
