"""What every room may use: files, documented fields, inputs of graphs, Ctrl-C, options of a generation."""
