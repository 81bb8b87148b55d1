"""`flarec screen`: which mix of data to convert with, by short runs of plain fine-tuning on each."""
