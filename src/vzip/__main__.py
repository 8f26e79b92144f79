"""``python -m vzip``, and the ``vzip`` that a wheel installs."""

import sys

from vzip import starting


def main() -> int:
    """Runs the command of the command line; returns its exit code."""
    starting.begin()
    from vzip.cli import main as run  # only now

    return run()


if __name__ == "__main__":  # a process that starts others may import this file
    sys.exit(main())
