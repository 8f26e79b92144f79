"""``python -m vzip``."""

import sys

from vzip.cli import main

sys.exit(main())
