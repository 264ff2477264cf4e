"""`python -m raykernel` is the console script."""

import sys

from raykernel.cli import main

if __name__ == "__main__":
    sys.exit(main())
