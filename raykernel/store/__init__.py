"""Kernels and results as Arrow files."""
