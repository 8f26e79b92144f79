"""Asks a model one question about an image or video file, and says how many visual tokens the answer rests on.

python -m vzip ask photo.jpg "What color is the star?"
python -m vzip ask photo.jpg "What word is written on the sign?" budget=32tok --overlay out.png
python -m vzip ask photo.jpg "What is this?" --model llava15_7b model.device_map=auto
python -m vzip ask photo.jpg "What does the sign say?" compressor=none budget=full pruner=fastv pruner.keep=100
python -m vzip ask clip.mp4 "What happens?" --model video_llava_7b budget=17tok model.num_frames=80
python -m vzip ask clip.mp4 "What happens?" --model qwen2_5_vl_7b budget=64tok model.fps=1
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.errors import ConfigError, ImageError
from vzip.json_files import whole_text
from vzip.paths import expanded, is_file, is_folder, shown
from vzip.results.files import check_writable

if TYPE_CHECKING:
    from PIL import Image

    from vzip.media.video import VideoSource
    from vzip.models.vlm import CompressedVlm

_OVERLAY_FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="an image of any format Pillow reads (HEIC too), or a video of any FFmpeg reads")
    parser.add_argument("question")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="as for eval.py: budget=32tok, compressor=none budget=full ..."
    )
    parser.add_argument("--model", default="tiny", help="a name in configs/model (default: tiny)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--overlay",
        type=Path,
        metavar="FILE",
        help="draw what was kept (left) and what merges into what (right), with question, answer and tokens",
    )


def main(arguments: argparse.Namespace) -> int:
    """Answers; everything that can be wrong is checked before the model is loaded."""
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={arguments.max_new_tokens}: must be 1 or more.")
    file = _checked_file(arguments.file)
    _check_overlay(arguments.overlay)
    from vzip.config.build import model_plan, refuse_unused
    from vzip.media.images import load_image
    from vzip.media.video import check_video, is_image

    refuse_unused(arguments.settings)
    model, compressor = model_plan([f"model={arguments.model}", *arguments.settings])
    images: list[Image.Image] = []
    videos: list[VideoSource] = []
    if is_image(file):
        images = [load_image(file)]
    else:
        check_video(file)
        videos = [file]

    import vzip

    if videos:
        from vzip.models.load import check_takes_videos

        check_takes_videos(model["name_or_path"], model["revision"])
    vlm = vzip.load_vlm(**model, compressor=compressor)
    inputs = build_inputs(vlm, arguments.question, images, videos)
    questions = [whole_text(arguments.question)]
    new = vlm.generate(**inputs, questions=questions, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    processor: Any = vlm.processor
    answer = processor.tokenizer.decode(new[0], skip_special_tokens=True).strip()
    print(answer or "(no words)")
    seen = {name: value for name, value in inputs.items() if name in vlm.adapter.input_names}
    (shape,) = vlm.adapter.read_inputs(**seen).shapes
    num_tokens = vlm.last_num_visual_tokens[0]
    counts = f"{num_tokens} visual tokens, {shape.num_vanilla} without compression"
    if vlm.last_pruned is not None:
        layers = vlm.last_pruned.visual_schedule[0]
        counts += f"; {sum(layers) / len(layers):.1f} on average over the language model's layers"
    print(f"({counts})")
    if arguments.overlay is not None:
        from vzip.analysis.kept import draw_kept
        from vzip.results.files import naming_the_file

        title = f"{arguments.model}, {type(compressor).__name__}"
        drawn = draw_kept(vlm, images[0] if images else file, questions[0], title=title, answer=answer or "(no words)")
        with naming_the_file(arguments.overlay):
            drawn.save(arguments.overlay)
        print(f"wrote {arguments.overlay}")
    return 0


def _checked_file(given: str) -> Path:
    if given.startswith(("http://", "https://")):
        raise ImageError(f"{given}: images and videos are read from files; download it first and give the path.")
    if not is_file(given):
        raise ImageError(f"{shown(given)}: {'is a directory' if is_folder(given) else 'no such file'}.")
    return expanded(given)


def _check_overlay(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix.lower() not in _OVERLAY_FORMATS:
        raise ConfigError(f"--overlay {path}: must end in one of {', '.join(_OVERLAY_FORMATS)}.")
    if not path.parent.is_dir():
        raise ConfigError(f"--overlay {path}: no folder {path.parent}. Make it, or name another.")
    if path.is_dir():
        raise ConfigError(f"--overlay {path}: is a folder. Name a file.")
    check_writable(path.parent)


def build_inputs(
    vlm: CompressedVlm, question: str, images: list[Image.Image], videos: list[VideoSource]
) -> dict[str, Any]:
    """The model's inputs for a question about an image or a video."""
    processor: Any = vlm.processor
    content = [{"type": "image" if images else "video"}, {"type": "text", "text": whole_text(question)}]
    turns = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return vlm.build_inputs([prompt], [images], [videos])
