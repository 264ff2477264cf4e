"""Tests of raykernel."""

import os

# Before torch is imported: the processes of a test run and those that they start share the cores,
# and threads that wait for each other would spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
