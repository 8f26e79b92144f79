"""Makes a LLaVA of a vision tower and a language model, with a new projector between them; then train that.

python scripts/assemble_llava.py openai/clip-vit-base-patch16 HuggingFaceTB/SmolLM-135M models/mine
python train.py model=llava_local model.name_or_path=models/mine train=projector_pretrain data=llava_pretrain_558k
python train.py model=llava_local model.name_or_path=models/mine train=projector data=llava_json data.json=FILE
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vzip import log
from vzip.errors import VzipError
from vzip.models.assemble import assemble


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tower", help="directory or hub id of a CLIP or SigLIP")
    parser.add_argument("language_model", help="directory or hub id of a causal language model")
    parser.add_argument("out", type=Path, help="must not exist yet, or be empty")
    parser.add_argument("--seed", type=int, default=0, help="of the projector's weights (default: 0)")
    arguments = parser.parse_args()
    log.setup()
    try:
        assemble(arguments.tower, arguments.language_model, arguments.out, arguments.seed)
    except VzipError as error:
        return log.tell_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
