"""Asks a model one question about a picture file, and says how many visual tokens the answer rests on.

python -m vzip ask photo.jpg "What color is the star?"
python -m vzip ask photo.jpg "What does the sign say?" budget=32tok
python -m vzip ask photo.jpg "What is this?" --model llava15_7b model.device_map=auto
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vzip.config.build import model_plan
from vzip.data.images import load_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="a picture file of any format Pillow reads")
    parser.add_argument("question")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="as for eval.py: budget=32tok, compressor=none budget=full ..."
    )
    parser.add_argument("--model", default="tiny", help="a name in configs/model (default: tiny)")
    parser.add_argument("--max-new-tokens", type=int, default=64)


def main(arguments: argparse.Namespace) -> int:
    """Answers; everything that can be wrong is checked before the model is loaded."""
    model, compressor = model_plan([f"model={arguments.model}", *arguments.settings])
    picture = load_image(arguments.image)

    import vzip

    vlm = vzip.load_vlm(**model, compressor=compressor)
    processor: Any = vlm.processor
    content = [{"type": "image"}, {"type": "text", "text": arguments.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = vlm.build_inputs([prompt], [[picture]])
    new = vlm.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    print(processor.tokenizer.decode(new[0], skip_special_tokens=True).strip())
    vanilla = vlm.adapter.expanded_lengths(1, inputs.get("image_sizes"))[0]
    print(f"({vlm.last_num_visual_tokens[0]} visual tokens, {vanilla} without compression)")
    return 0
