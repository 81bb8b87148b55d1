"""Kernels, one folder per semantic op; they import only the layout and the errors, never one another."""
