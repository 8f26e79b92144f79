"""Makes a LLaVA of a vision tower and a language model, with a new projector between them; then train that.

python scripts/assemble_llava.py openai/clip-vit-base-patch16 HuggingFaceTB/SmolLM-135M models/mine
python train.py model=llava_local model.name_or_path=models/mine train=projector_pretrain data=llava_pretrain_558k
python train.py model=llava_local model.name_or_path=models/mine train=projector_new data=llava_json data.json=FILE
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import get_args

from vzip import log
from vzip.errors import VzipError
from vzip.models.assemble import Template, assemble


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tower", help="directory or hub id of a CLIP or SigLIP")
    parser.add_argument("language_model", help="directory or hub id of a causal language model")
    parser.add_argument("out", type=Path, help="must not exist yet, or be empty")
    parser.add_argument("--seed", type=int, default=0, help="of the projector's weights (default: 0)")
    parser.add_argument(
        "--template",
        choices=get_args(Template),
        help="chat template: the language model's own, or Vicuna's as LLaVA-1.5's (default: own where it has one)",
    )
    arguments = parser.parse_args(argv)
    log.setup()
    try:
        made = assemble(**vars(arguments))
    except VzipError as error:
        return log.tell_error(error)
    of = "the language model's own" if made.template == "own" else "Vicuna's"
    print(f"{arguments.out}: {made.num_visual_tokens} visual tokens an image, {of} chat template. Train its projector:")
    template = "chat" if made.template == "own" else "vicuna_v1"
    model = f"model=llava_local model.name_or_path={shlex.quote(str(arguments.out))}"
    print(f"  python train.py {model} train=projector_new train.template={template} data=llava_json data.json=FILE")
    return 0


if __name__ == "__main__":
    sys.exit(main())
