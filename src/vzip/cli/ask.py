"""Asks a model one question about an image or video file, and says how many visual tokens the answer rests on.

python -m vzip ask photo.jpg "What color is the star?"
python -m vzip ask photo.jpg "What does the sign say?" budget=32tok
python -m vzip ask photo.jpg "What does the sign say?" compressor=none budget=full pruner=fastv pruner.keep=100
python -m vzip ask photo.jpg "What is this?" --model llava15_7b model.device_map=auto
python -m vzip ask clip.mp4 "What happens?" --model video_llava_7b budget=17tok model.num_frames=80
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vzip.config.build import model_plan
from vzip.errors import ConfigError, ImageError
from vzip.json_files import whole_text
from vzip.media.images import load_image
from vzip.media.video import DEFAULT_NUM_FRAMES, is_picture, load_video
from vzip.paths import is_file, is_folder, shown

if TYPE_CHECKING:
    from vzip.models.vlm import CompressedVlm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="an image of any format Pillow reads, or a video of any FFmpeg reads")
    parser.add_argument("question")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="as for eval.py: budget=32tok, compressor=none budget=full ..."
    )
    parser.add_argument("--model", default="tiny", help="a name in configs/model (default: tiny)")
    parser.add_argument("--max-new-tokens", type=int, default=64)


def main(arguments: argparse.Namespace) -> int:
    """Answers; everything that can be wrong is checked before the model is loaded."""
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={arguments.max_new_tokens}: must be 1 or more.")
    model, compressor = model_plan([f"model={arguments.model}", *arguments.settings])
    if not is_file(arguments.file):
        kind = "is a directory" if is_folder(arguments.file) else "no such file"
        raise ImageError(f"{shown(arguments.file)}: {kind}.")
    pictures: list[Image.Image] = []
    frames: list[Image.Image] = []
    if is_picture(arguments.file):
        pictures = [load_image(arguments.file)]
    else:
        # Said outright, so that a model without a video tower is refused before its weights are read.
        model["num_frames"] = model["num_frames"] or DEFAULT_NUM_FRAMES
        frames = load_video(arguments.file, model["num_frames"])

    import vzip

    vlm = vzip.load_vlm(**model, compressor=compressor)
    inputs = build_inputs(vlm, arguments.question, pictures, frames)
    new = vlm.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    processor: Any = vlm.processor
    print(processor.tokenizer.decode(new[0], skip_special_tokens=True).strip())
    seen = {name: value for name, value in inputs.items() if name in vlm.adapter.input_names}
    (shape,) = vlm.adapter.read_inputs(**seen).shapes
    counts = f"{vlm.last_num_visual_tokens[0]} visual tokens, {shape.num_vanilla} without compression"
    if vlm.last_pruned is not None:
        layers = vlm.last_pruned.visual_schedule[0]
        counts += f"; {sum(layers) / len(layers):.1f} on average over the language model's layers"
    print(f"({counts})")
    return 0


def build_inputs(
    vlm: CompressedVlm, question: str, pictures: list[Image.Image], frames: list[Image.Image]
) -> dict[str, Any]:
    """The model's inputs for a question about an image, or about a video's frames if there is no image."""
    processor: Any = vlm.processor
    content = [{"type": "image" if pictures else "video"}, {"type": "text", "text": whole_text(question)}]
    turns = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return vlm.build_inputs([prompt], [pictures], [[] if pictures else [frames]])
