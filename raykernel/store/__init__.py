"""Kernel blocks and result rows in Arrow files: which are missing, whole, and what they sum to."""
