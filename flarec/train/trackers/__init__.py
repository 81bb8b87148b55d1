"""Steps and evaluations of a run in TensorBoard, Weights & Biases or trackio (`--report-to`): each step once, however
often the run was stopped."""
