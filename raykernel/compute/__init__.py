"""Workers that complete a kernel's missing blocks, here or on a Ray cluster."""
