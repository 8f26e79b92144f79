"""How near compressed models stay to vanilla on any folder of images; no labels are needed.

python -m vzip fidelity photos
python -m vzip fidelity photos compressor=visionzip,divprune,random budget=64tok,32tok
python -m vzip fidelity photos --prompts questions.txt model=llava15_7b model.device_map=auto

Vanilla answers each prompt about each image. Along its answer the next-token distributions are compared: KL divergence
(vanilla || compressed, in nats, mean over the tokens) and how often the most likely token is the same. The compressed
model then answers by itself: how often is that answer the same to the last token? Each is the mean over images of an
image's own mean, with a 95 % bootstrap interval over images. Writes fidelity.json.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console

from vzip.cli.ask import build_inputs
from vzip.config.method_grid import GridMethod, MethodGrid, method_grid
from vzip.errors import ConfigError, ImageError, MissingPackageError, RunExistsError
from vzip.keys import raise_all
from vzip.media.images import load_image
from vzip.media.video import is_image
from vzip.paths import expanded, is_file, is_folder, shown
from vzip.progress import Progress
from vzip.results import provenance
from vzip.results.files import check_writable, write_json
from vzip.results.layout import Layout, Piece, print_layout
from vzip.results.owner import owning
from vzip.results.stats import mean_interval

if TYPE_CHECKING:
    from vzip.analysis.fidelity import AnswerFidelity
    from vzip.models.vlm import CompressedVlm

logger = logging.getLogger(__name__)
T = TypeVar("T")

FILE_NAME = "fidelity.json"
BUILT_IN = "vzip/tiny"
PROMPT = "Describe the image."
BUILT_IN_PROMPT = "How many objects are in the picture?"  # a wording that the built-in model knows
ENDINGS = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".heic"}  # images, also if damaged
PLACEHOLDERS = ("<image>", "<video>", "<|image_pad|>", "<|video_pad|>")
CACHE_GIB = 1.0  # the vision tower's outputs of one image
NUM_RESAMPLES, SEED = 2000, 0
HEAD = ("method", "budget", "visual tokens", "KL, nats [95 %]", "top token, % [95 %]", "same answer, % [95 %]")
NO_WIDTH = "An interval without width says that these images do not differ, not that others would not."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", help="a folder; images in folders inside it count too")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="as for eval.py -m: budget=64tok,32tok compressor=visionzip,divprune model=NAME ... (default: model=tiny)",
    )
    words = f'one a line, each asked of each image (default: "{PROMPT}", the built-in model: "{BUILT_IN_PROMPT}")'
    parser.add_argument("--prompts", metavar="FILE", help=words)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="most tokens of an answer (default: 64)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"for {FILE_NAME} (default: runs/fidelity/MODEL/FOLDER)"
    )
    parser.add_argument("--overwrite", action="store_true", help=f"replace a {FILE_NAME} that is there")


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints the table and writes the record; what can be wrong is checked before the model is loaded."""
    problems: list[str] = []

    def checked(check: Callable[[Any], T], given: Any) -> T | None:
        try:
            return check(given)
        except (ConfigError, ImageError) as error:
            problems.append(str(error))
            return None

    paths = checked(image_files, arguments.images)
    prompts = checked(read_prompts, arguments.prompts)
    grid = checked(method_grid, arguments.settings)
    if arguments.max_new_tokens < 1:
        problems.append(f"--max-new-tokens={arguments.max_new_tokens}: must be 1 or more.")
    raise_all(problems)
    assert paths is not None and prompts is not None and grid is not None
    prompts = prompts or [BUILT_IN_PROMPT if grid.model["name_or_path"] == BUILT_IN else PROMPT]
    out = Path("runs/fidelity", grid.model_name, expanded(arguments.images).resolve().name)
    out = out if arguments.out is None else expanded(arguments.out)
    if (out / FILE_NAME).exists() and not arguments.overwrite:
        raise RunExistsError(
            f"{out} already holds a {FILE_NAME}; give another --out DIR, or --overwrite to replace it."
        )
    check_writable(out)
    with owning(out, "--out DIR"):
        record = measure(grid, paths, prompts, arguments.max_new_tokens)
        print_layout(lay_out(record), Console())
        write_json(out / FILE_NAME, {"images_dir": arguments.images, **record})
    print(f"wrote {out / FILE_NAME}")
    return 0


def image_files(given: str) -> list[Path]:
    """The image files of a folder, of which one at least can be read."""
    if not is_folder(expanded(given)):
        raise ImageError(f"{shown(given)}: {'a file, no folder' if is_file(expanded(given)) else 'no such folder'}.")
    files = sorted(path for path in expanded(given).rglob("*") if path.is_file())
    paths = [path for path in files if path.suffix.lower() in ENDINGS or is_image(path)]
    problem = ""
    for path in paths:
        try:
            load_image(path)
        except (ImageError, MissingPackageError) as error:
            problem = problem or f" The first: {error}"
        else:
            return paths
    what = f"none of its {len(paths)} images can be read." if paths else f"holds no image ({len(files)} other files)."
    raise ImageError(f"{shown(given)}: {what}{problem}")


def read_prompts(given: str | None) -> list[str]:
    """The lines of a file; none if none is given."""
    if given is None:
        return []
    if not is_file(expanded(given)):
        raise ConfigError(f"--prompts {shown(given)}: no such file. It holds one prompt a line.")
    try:
        lines = expanded(given).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {shown(given)}: cannot be read as UTF-8 text ({error}).") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise ConfigError(f"--prompts {shown(given)}: holds no prompt. Write one a line.")
    if marked := [prompt for prompt in prompts if any(mark in prompt for mark in PLACEHOLDERS)]:
        raise ConfigError(
            f"--prompts {shown(given)}: {marked[0]!r}: the image's placeholder is put before each prompt; leave out"
            f" {', '.join(PLACEHOLDERS)}."
        )
    return prompts


def measure(grid: MethodGrid, paths: Sequence[Path], prompts: Sequence[str], max_new_tokens: int) -> dict[str, Any]:
    """Loads the model, asks everything and returns the record.

    Raises:
        ImageError: no image could be used.
        TokenCountError: an image entered the language model with another number of tokens than the method's.
    """
    import vzip
    from vzip.analysis.fidelity import MEASURES, image_means

    started = time.monotonic()
    vlm = vzip.load_vlm(**grid.model, compressor=grid.methods[0].compressor)
    for method in grid.methods:
        vlm.compressor = method.compressor  # a budget that does not fit is refused here
    means: list[dict[str, list[float]]] = [{name: [] for name in MEASURES} for _ in grid.methods]
    counts: list[list[int]] = [[] for _ in grid.methods]
    used: list[str] = []
    damaged: list[dict[str, str]] = []
    num_answer_tokens = 0
    with Progress(f"comparing {len(grid.methods)} methods with vanilla", "images", len(paths)) as progress:
        for path in progress.track(paths):
            try:
                image = load_image(path)
                asked = [{**build_inputs(vlm, prompt, [image], []), "questions": [prompt]} for prompt in prompts]
            except (ImageError, MissingPackageError) as error:
                logger.warning("left out: %s", error)
                damaged.append({"image": str(path), "problem": str(error)})
                continue
            used.append(str(path))
            answers, length = _compare(vlm, grid.methods, asked, max_new_tokens, counts)
            num_answer_tokens += length
            for own, of_method in zip(means, answers, strict=True):
                for name, value in image_means(of_method).items():
                    own[name].append(value)
    if not used:
        raise ImageError(f"none of {len(paths)} images can be used. The first: {damaged[0]['problem']}")
    model = {"name": grid.model_name, "name_or_path": vlm.name_or_path, "revision": vlm.revision}
    model |= {"weights_sha256": provenance.weights_sha256(vlm.name_or_path), "dtype": str(vlm.model.dtype)}
    return {
        "kind": "fidelity",
        "model": model,
        "prompts": list(prompts),
        "max_new_tokens": max_new_tokens,
        "num_images": len(used),
        "num_damaged": len(damaged),
        "num_answer_tokens": num_answer_tokens,
        "bootstrap": {"num_resamples": NUM_RESAMPLES, "seed": SEED, "confidence": 0.95, "unit": "image"},
        "methods": [
            {
                "method": method.method,
                "budget": method.budget,
                "settings": repr(method.compressor),
                "num_visual_tokens": sum(own_counts) / len(own_counts),
                **{name: _summary(values) for name, values in own.items()},
                "per_image": own,
            }
            for method, own, own_counts in zip(grid.methods, means, counts, strict=True)
        ],
        "images": used,
        "damaged": damaged,
        "code": provenance.code_state(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "wall_time_s": round(time.monotonic() - started, 3),
    }


def _compare(
    vlm: CompressedVlm,
    methods: Sequence[GridMethod],
    asked: Sequence[Mapping[str, Any]],
    max_new_tokens: int,
    counts: Sequence[list[int]],
) -> tuple[list[list[AnswerFidelity]], int]:
    """One image under every method, its tower run once; for each method a comparison a prompt, and vanilla's tokens."""
    from vzip.analysis.fidelity import answer_logits, compare_answers
    from vzip.compressors.controls import Identity
    from vzip.models.towers.cache import TowerCache
    from vzip.results.token_count import check_token_counts

    found: list[list[AnswerFidelity]] = [[] for _ in methods]
    length = 0
    greedy: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    vlm.adapter.tower_cache = TowerCache(CACHE_GIB)
    for inputs in asked:
        vlm.compressor = Identity()
        told = vlm.generate(**inputs, **greedy)[0]
        vanilla = answer_logits(vlm, inputs, told)
        length += len(told)
        for method, own, count in zip(methods, found, counts, strict=True):
            vlm.compressor = method.compressor
            said = vlm.generate(**inputs, **greedy)[0]
            count += check_token_counts(vlm, inputs, [1], [0])[0]
            own.append(compare_answers(vanilla, answer_logits(vlm, inputs, told), told.tolist(), said.tolist()))
    vlm.adapter.tower_cache = None
    return found, length


def _summary(values: Sequence[float]) -> dict[str, float | None]:
    """The mean over images with its interval; of one image there is none."""
    low, high = mean_interval(np.array(values), NUM_RESAMPLES, SEED) if len(values) > 1 else (None, None)
    return {"mean": sum(values) / len(values), "low": low, "high": high}


def lay_out(record: Mapping[str, Any]) -> Layout:
    """The record as a table."""
    lines = []
    for row in record["methods"]:
        shares = [_cell(row[name], 100, 1) for name in ("agreement", "identical")]
        words = (row["method"], row["budget"], f"{row['num_visual_tokens']:g}", _cell(row["kl"], 1, 4), *shares)
        lines.append(tuple(map(Piece, words)))
    title = (
        f"{record['model']['name']} against itself with all visual tokens; images: {record['num_images']}, prompts:"
        f" {len(record['prompts'])}, tokens of vanilla's answers: {record['num_answer_tokens']}"
    )
    remarks = [f"Images that cannot be used, left out: {record['num_damaged']}."] if record["damaged"] else []
    cells = [row[name] for row in record["methods"] for name in ("kl", "agreement", "identical")]
    remarks += [NO_WIDTH] if any(cell["low"] is not None and cell["low"] == cell["high"] for cell in cells) else []
    return Layout(title, HEAD, (tuple(lines),), tuple(remarks), left=frozenset({0, 1}))


def _cell(value: Mapping[str, Any], factor: int, digits: int) -> str:
    mean, *ends = (f"{factor * value[key]:.{digits}f}" for key in ("mean", "low", "high") if value[key] is not None)
    return f"{mean} [{', '.join(ends)}]" if ends else mean
