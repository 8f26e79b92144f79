"""Writes the visual tokens of images or videos, which vLLM takes in place of an image (--enable-mm-embeds).

python -m vzip embed photo.jpg compressor=mmtok budget=64tok --question "What color is the star?" --out F.safetensors
python -m vzip embed a.jpg b.jpg --model llava15_7b compressor=flowcut budget=64tok --out embeds
python -m vzip embed clip.mp4 --model video_llava_7b budget=17tok --out clip.safetensors

For methods that a server cannot run itself: text-aware ones, for which the question is given here and asked there, and
those that act inside the vision tower; and for other families than it serves. docs/serve.md has a client.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.errors import ConfigError, ImageError, RunExistsError, UnsupportedModelError
from vzip.json_files import whole_text
from vzip.paths import expanded, is_file, shown

if TYPE_CHECKING:
    from torch import Tensor

    from vzip.models.vlm import CompressedVlm

ENDING = ".safetensors"
_SETTING = re.compile(r"[+~]*[A-Za-z_][\w.@/]*=.*", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="FILE ... KEY=VALUE ...", help="images or videos; settings as for eval.py"
    )
    parser.add_argument("--question", help="what will be asked about them; a text-aware method must know it")
    parser.add_argument("--model", default="tiny", help="a name in configs/model, a directory or a hub id [tiny]")
    parser.add_argument(
        "--out", type=Path, required=True, help=f"a file that ends in {ENDING}, or a folder: a file for each image"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def main(arguments: argparse.Namespace) -> int:
    """Encodes; everything that can be wrong is checked before the model is loaded."""
    settings = [word for word in arguments.words if _SETTING.fullmatch(word) and not is_file(word)]
    targets = _targets([word for word in arguments.words if word not in settings], arguments.out, arguments.overwrite)
    from vzip.config.build import model_plan, refuse_unused
    from vzip.config.serving import model_words
    from vzip.media.images import load_image
    from vzip.media.video import check_video, is_image

    refuse_unused(settings)
    model, compressor = model_plan([*model_words(arguments.model), *settings])
    if model["pruner"] is not None:
        raise ConfigError(
            "pruner=: a pruner drops tokens inside the language model, so nothing of it is what enters; leave it out."
        )
    if compressor.reads_text and not (arguments.question or "").strip():
        raise ConfigError(
            f"{type(compressor).__name__} is text-aware: which tokens it keeps depends on the question. Add --question"
            " TEXT, the same that the server will be asked."
        )
    images = {file for file in targets if is_image(file)}
    for file in targets:  # read to see that it can be; of many, not all are held until their turn
        (load_image if file in images else check_video)(file)

    import vzip
    from vzip.models.load import check_takes_videos
    from vzip.progress import Progress
    from vzip.results.files import make_folder, naming_the_file, replace_file
    from vzip.serving.embeddings import to_bytes

    if len(images) < len(targets):
        check_takes_videos(model["name_or_path"], model["revision"])
    _check_family(model)
    question = None if arguments.question is None else whole_text(arguments.question)
    vlm = vzip.load_vlm(**model, compressor=compressor)
    told = []
    with Progress("encoding", "files", len(targets)) as progress:
        for file, target in targets.items():
            tokens = _encode(vlm, load_image(file) if file in images else file, question)
            about = {
                "model": vlm.name_or_path,
                "revision": vlm.revision,
                "method": repr(compressor),
                "question": question if compressor.reads_text else None,
                "file": file.name,
            }
            make_folder(target.parent)
            with naming_the_file(target):
                replace_file(target, to_bytes(tokens, about))
            count, width = tokens.shape
            told.append(f"wrote {target}: {count} visual tokens, {width} wide, {str(tokens.dtype)[6:]}")
            progress.advance(1)
    print("\n".join(told))
    return 0


def _targets(files: list[str], out: Path, overwrite: bool) -> dict[Path, Path]:
    """Where the tokens of each file go."""
    if not files:
        raise ConfigError("no image and no video is named: give one or more files before or after the settings.")
    for file in files:
        if not is_file(file):
            raise ImageError(f"{shown(file)}: no such file.")
    paths, out = [expanded(file) for file in files], expanded(out)
    if out.suffix == ENDING:
        if len(paths) > 1:
            raise ConfigError(f"--out {out}: one file for {len(paths)} images; name a folder.")
        targets = {paths[0]: out}
    else:
        targets = {path: out / f"{path.stem}{ENDING}" for path in paths}
    if len(set(targets.values())) < len(files):
        raise ConfigError(f"--out {out}: several files would be written as one, since their names are the same.")
    for target in targets.values():
        if target.exists() and not overwrite:
            raise RunExistsError(f"{target}: exists already; add --overwrite, or name another --out.")
    return targets


def _check_family(model: dict[str, Any]) -> None:
    """Refuses families whose tokens do not say all that enters the language model."""
    from vzip.config.serving import config_of
    from vzip.models.families import adapter_class_for_config

    source, config = config_of(model)
    family = adapter_class_for_config(config)
    if family.keeps_places or family.has_planes or model["positions"] == "original":
        raise UnsupportedModelError(
            f"model.name_or_path={source}: its visual tokens keep the positions that they have in the image, and vLLM"
            " numbers what it is handed one after the other: answers would be wrong. Use a family whose tokens have"
            " none (LLaVA's kin, InternVL), with model.positions=null."
        )


def _encode(vlm: CompressedVlm, shown_one: Any, question: str | None) -> Tensor:
    """The visual tokens ``[num_visual_tokens, d_text]`` of an image or a video file."""
    import torch

    questions = None if question is None else [question]
    with torch.inference_mode():
        if isinstance(shown_one, Path):
            (tokens,) = vlm.encode_videos(**vlm.preprocess_videos([shown_one]), questions=questions)
        else:
            (tokens,) = vlm.encode_images(**vlm.preprocess_images([shown_one]), questions=questions)
    return tokens
