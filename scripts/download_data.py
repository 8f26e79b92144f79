"""Fetches the training data that a manifest names: `python -m vzip data download` under its earlier name.

python scripts/download_data.py llava_v1_5_mix665k --root /data/llava
"""

import sys
from collections.abc import Sequence

from vzip import cli


def main(words: Sequence[str] | None = None) -> int:
    return cli.main(["data", "download", *(sys.argv[1:] if words is None else words)])


if __name__ == "__main__":
    sys.exit(main())
