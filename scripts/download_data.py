"""Fetches the training data that a manifest names.

python scripts/download_data.py llava_v1_5_mix665k --root /data/llava          # about 150 GB with what is unpacked
python scripts/download_data.py llava_v1_5_mix665k --root /data/llava --only annotations coco
python scripts/download_data.py llava_v1_5_mix665k --list

Interrupted or failed: run the same command again, it continues.
Afterwards: python -m vzip data verify MANIFEST --root DIR.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from vzip import log
from vzip.data.download import Downloader
from vzip.data.manifest import file_table, load_manifest
from vzip.errors import VzipError


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", nargs="?", default="llava_v1_5_mix665k", help="name in data_manifests, or a file")
    parser.add_argument("--root", type=Path, help="folder to fetch into")
    parser.add_argument("--only", nargs="+", metavar="SOURCE", help="these sources alone (see --list)")
    parser.add_argument("--list", action="store_true", help="print what there is and fetch nothing")
    parser.add_argument("--no-extract", action="store_true", help="leave the archives packed")
    parser.add_argument("--delete-archives", action="store_true", help="remove each archive once it is unpacked")
    parser.add_argument("--attempts", type=int, default=8, help="for each file in one run (default: 8)")
    args = parser.parse_args(words)
    log.setup()
    try:
        manifest = load_manifest(args.manifest)
        files = manifest.choose(args.only)
        if args.list:
            Console().print(file_table(manifest, files))
            return 0
        if args.root is None:
            parser.error("--root DIR is missing: the folder to fetch into")
        downloader = Downloader(manifest, args.root.expanduser(), num_attempts=max(1, args.attempts))
        downloader.run(files, extract=not args.no_extract, delete_archives=args.delete_archives)
    except VzipError as error:
        return log.tell_error(error)
    by_hand = [file for file in files if file.url is None]
    for file in by_hand:
        print(f"{file.source}: to be fetched by hand. {file.note}")
    print(f"now check what came: python -m vzip data verify {args.manifest} --root {args.root}")
    return 1 if by_hand else 0


if __name__ == "__main__":
    sys.exit(main())
