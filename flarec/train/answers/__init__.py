"""Training data that the source writes itself: `flarec answers`, and `flarec convert --prompts`."""
