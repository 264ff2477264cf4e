"""What follows from a kernel: arrays in, numbers out."""
