"""Writes a small random checkpoint of a family, for trying commands without a download.

python scripts/make_random_model.py video_llava runs/random/video_llava
python eval.py model=llava_local model.name_or_path=runs/random/video_llava budget=17tok eval.limit=8
python -m vzip ask clip.mp4 "What happens?" --model llava_local model.name_or_path=runs/random/video_llava budget=17tok
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vzip import log
from vzip.demo import random_model
from vzip.errors import VzipError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help=", ".join(random_model.FAMILIES))
    parser.add_argument("directory", type=Path, help="must not exist yet, or be empty")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    arguments = parser.parse_args()
    log.setup()
    try:
        random_model.save(arguments.family, arguments.directory, arguments.seed)
    except VzipError as error:
        return log.tell_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
