"""``python -m vzip``."""

import sys

from vzip.cli import main

if __name__ == "__main__":  # a process that starts others may import this file
    sys.exit(main())
