"""A figure of the paper from what is measured here: PNG, SVG, the numbers behind it (CSV) and its caption (TXT).

  python -m vzip figure all                                 every one of them, one after the other
  python -m vzip figure 1                                   what each benchmark keeps, and the time saved: from runs/
  python -m vzip figure 4                                   score against tokens: what runs/ holds of the built-in model
  python -m vzip figure 4 model=mini_gemini_7b 'eval.tasks=[pope_splits,textvqa_val_ocr,gqa]'     the paper's
  python -m vzip figure 7                                   two questions about an image, one after the other
  python -m vzip figure 7 model=llava15_7b --images photos --prompts questions.txt
  python -m vzip figure 2                                   attention over images; how few patches have most of it
  python -m vzip figure 5 model=clip_directory --images photos      attention layer by layer, of a bare CLIP or SigLIP
  python -m vzip figure 6 --patch 12,7                      where the attention of a patch goes, and how far
  python -m vzip figure 8                                   more frames of a video for as many visual tokens
  python -m vzip figure 8 model=video_llava_7b --video clip.mp4 --prompt "What happens?"

1 and 4 read the records of finished runs. 7 asks: vanilla, VisionZip, and FastV and SparseVLM, which choose by the
question; on images of one's own --prompts has the first question and the second, a line each, then further pairs.
2, 5, 6 and 9 to 14 show the vision tower's attention: on --images, on the tasks of eval=NAME, or else on TextVQA's
validation set, the built-in model's on its own benchmark.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir

from vzip.cli import attention_figures, video_figure
from vzip.cli.fidelity import image_files, read_prompts
from vzip.config.build import chat_plan, resolved
from vzip.config.options import config_dir
from vzip.config.overrides import check_overrides
from vzip.config.validate import validate
from vzip.errors import ConfigError, ImageError, ManifestError, MissingPackageError, RunExistsError, VzipError
from vzip.keys import raise_all
from vzip.media.images import load_image
from vzip.paths import expanded
from vzip.progress import Progress
from vzip.report.figures.drawing import Drawing, check_free, write_drawing
from vzip.results.files import check_writable
from vzip.results.record import Run, find_runs

if TYPE_CHECKING:
    from vzip.report.figures.figure_7 import Asked, Dialogue

logger = logging.getLogger(__name__)

VANILLA = ("compressor=none", "budget=full")
# By name, as overrides. What chooses by the question drops after the layers that fit a model of so many.
TWO_TURNS: Mapping[str, tuple[str, ...]] = {
    "vanilla": VANILLA,
    "VisionZip": ("compressor=visionzip", "budget=64tok"),
    "FastV": (*VANILLA, "pruner=fastv", "pruner.K=2", "pruner.keep=64"),
    "SparseVLM": (*VANILLA, "pruner=sparsevlm"),
}
FEW_LAYERS = {"SparseVLM": ("pruner.layers=[0,1,2]",)}  # the built-in model has five, the published rule's are 2, 6, 15
BUILT_IN = "vzip/tiny"
NUM_DIALOGUES = 40
ALL_OPTIONS = ("runs", "images", "prompts", "video", "prompt", "limit", "max_new_tokens", "layer", "patch", "pixel")


@dataclass(frozen=True)
class FigureCommand:
    """What draws a figure, and which options it has beside the common ones."""

    draw: Callable[[argparse.Namespace], Drawing]
    options: frozenset[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("number", help=f"of the paper's figure, or all: {', '.join(sorted(FIGURES, key=int))}")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as for eval.py: model=NAME eval=NAME ...")
    parser.add_argument("--runs", type=Path, help="1, 4: where the records are (runs)")
    parser.add_argument("--images", metavar="DIR", help="7 and attention: a folder of images")
    parser.add_argument("--prompts", metavar="FILE", help="7: a first question and a second, a line each")
    parser.add_argument("--video", metavar="FILE", help="8: a video (default: made of the built-in benchmark's scenes)")
    parser.add_argument("--prompt", metavar="TEXT", help="8: what is asked about it")
    limits = (
        f"7: dialogues at most ({NUM_DIALOGUES}); 8: videos at most ({video_figure.NUM_VIDEOS}); "
        f"attention: images at most ({attention_figures.NUM_IMAGES})"
    )
    parser.add_argument("--limit", type=int, help=limits)
    parser.add_argument("--max-new-tokens", type=int, help="7, 8: most tokens of an answer (32, 64)")
    parser.add_argument("--layer", type=int, help="attention: as in hidden_states (default: the model's select layer)")
    parser.add_argument("--patch", metavar="ROW,COLUMN", help="6, 14: the chosen patch, from 0 (default: the middle)")
    parser.add_argument("--pixel", metavar="X,Y", help="6, 14: the same by a pixel of what the vision tower sees")
    parser.add_argument("--out", type=Path, default=Path("runs/figures"), metavar="DIR", help="(runs/figures)")
    parser.add_argument("--overwrite", action="store_true", help="replace a figure that is there")


def main(args: argparse.Namespace) -> int:
    """Draws and writes; what can be wrong is checked before a model is loaded."""
    if args.number == "all":
        return _all(args)
    if args.number not in FIGURES:
        raise ConfigError(f"figure {args.number}: not drawn here. There are: {', '.join(sorted(FIGURES, key=int))}.")
    command = FIGURES[args.number]
    given = [name for name in ALL_OPTIONS if getattr(args, name) is not None]
    if wrong := [f"--{name.replace('_', '-')}" for name in given if name not in command.options]:
        raise ConfigError(f"{', '.join(wrong)}: no option of figure {args.number}; python -m vzip figure --help.")
    name, out = f"figure_{args.number}", expanded(str(args.out))
    check_free(out, name, args.overwrite)
    check_writable(out)
    drawing = command.draw(args)
    print(drawing.caption)
    print(f"wrote {', '.join(str(path) for path in write_drawing(drawing, out, name))}")
    return 0


def _all(args: argparse.Namespace) -> int:
    """Every figure of ``FIGURES``: what is there is kept, what fails is named at the end; 1 where something failed."""
    failed: dict[str, VzipError] = {}
    num_kept = 0
    for place, number in enumerate(sorted(FIGURES, key=int), start=1):
        print(f"figure {number} ({place} of {len(FIGURES)})", file=sys.stderr, flush=True)
        options = FIGURES[number].options
        unused = {name: None for name in ALL_OPTIONS if name not in options}
        try:
            main(argparse.Namespace(**{**vars(args), **unused, "number": number}))
        except RunExistsError as error:
            num_kept += 1
            print(f"kept: {error}")
        except VzipError as error:
            failed[number] = error
            logger.warning("figure %s: not drawn", number)
    print(f"{len(FIGURES) - len(failed) - num_kept} figures drawn, {num_kept} kept, {len(failed)} not drawn")
    for number, why in failed.items():
        print(f"figure {number}: {why}", file=sys.stderr)
    return 1 if failed else 0


def _records(args: argparse.Namespace, model: Mapping[str, Any]) -> tuple[Path, list[Run]]:
    """The finished evaluations of a model, and where they lie."""
    folder = Path("runs") if args.runs is None else expanded(str(args.runs))
    if args.runs is not None and not folder.is_dir():
        raise ConfigError(f"--runs {folder}: no such folder.")
    # As it was configured: what was loaded is, of the built-in model, a path of the machine.
    unreadable: list[str] = []
    found = find_runs(folder, unreadable=unreadable)
    for message in unreadable:
        logger.warning("left out: %s", message)
    named = [((run.record.get("config") or {}).get("model") or {}, run) for run in found]
    return folder, [run for chosen, run in named if chosen.get("name_or_path") == model["name_or_path"]]


def figure_1(args: argparse.Namespace) -> Drawing:
    """Retention of each benchmark and the time saved, from records."""
    from vzip.report.costs import find_benches
    from vzip.report.figures.figure_1 import MIN_TASKS, draw, evaluation_times, prefill_times, radar_of
    from vzip.report.figures.figure_4 import points_of

    config = _config(args.settings)
    model, tasks = config["model"], list(config["eval"]["tasks"])
    folder, runs = _records(args, model)
    points, num_left_out = points_of(runs, tasks, config)
    words = shlex.join(args.settings or ["model=tiny"])
    radar = radar_of(points, tasks)
    if radar is None:
        raise ManifestError(
            f"{folder}: figure 1 needs {model['name']} without compression and with a method, each on the same"
            f" {MIN_TASKS} or more of {', '.join(tasks)}. This makes such records:\n"
            f"  python eval.py -m {words} compressor=visionzip,random budget=full,64tok"
        )
    prefill, machine = prefill_times(find_benches(folder), model["name"], radar.num_tokens)
    evaluation = evaluation_times(radar, runs)
    missing = []
    if not prefill:
        missing.append(
            f"No prefill at {radar.num_tokens:g} tokens is measured; this does:"
            f" python -m vzip bench model={model['name']} budget={radar.num_tokens:.0f}tok"
        )
    if len(evaluation) < 2:
        evaluation = []
        missing.append(
            "No two evaluations have a time of their own (a sweep's jobs take the vision tower's outputs over); each"
            f" alone has: python eval.py {words} compressor=none budget=full overwrite=true, then with the budget"
        )
    return draw(radar, prefill, machine, evaluation, model["name"], num_left_out, missing)


def figure_4(args: argparse.Namespace) -> Drawing:
    """Score against visual tokens, from records."""
    from vzip.report.figures.figure_4 import draw, points_of

    config = _config(args.settings)
    model, tasks = config["model"], list(config["eval"]["tasks"])
    folder, runs = _records(args, model)
    points, num_left_out = points_of(runs, tasks, config)
    if not points:
        words = " ".join(args.settings or ["model=tiny"])
        raise ManifestError(
            f"{folder}: no record of {model['name']} on {', '.join(tasks)}. This makes some, a point a run:\n"
            f"  python eval.py -m {words} compressor=visionzip,random budget=full,192tok,128tok,64tok"
        )
    return draw(points, model["name"], num_left_out)


def _config(words: Sequence[str]) -> dict[str, Any]:
    directory = config_dir()
    check_overrides(list(words), directory, "eval")
    with initialize_config_dir(config_dir=str(directory), version_base="1.3"):
        config = resolved(compose("eval", list(words)))
    validate(config)
    return config


def figure_7(args: argparse.Namespace) -> Drawing:
    """Two turns about an image, under methods that read the question and one that does not."""
    limit, max_new_tokens = args.limit or NUM_DIALOGUES, args.max_new_tokens or 32
    problems = [f"--limit={args.limit}: must be 1 or more."] if args.limit is not None and args.limit < 1 else []
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        problems.append(f"--max-new-tokens={args.max_new_tokens}: must be 1 or more.")
    if taken := [
        word for word in args.settings if word.split("=", 1)[0].split(".")[0] in ("compressor", "budget", "pruner")
    ]:
        problems.append(f"{' '.join(taken)}: figure 7 sets the methods itself: {', '.join(TWO_TURNS)}.")
    if (args.images is None) != (args.prompts is None):
        problems.append("--images and --prompts go together: a folder, and a first and a second question, a line each.")
    paths, prompts = [], []
    try:
        paths = [] if args.images is None else image_files(args.images)
        prompts = read_prompts(args.prompts)
        if len(prompts) % 2:
            problems.append(
                f"--prompts {args.prompts}: {len(prompts)} questions; they must come in pairs, two lines each."
            )
    except (ConfigError, ImageError) as error:
        problems.append(str(error))
    raise_all(problems)
    model = _config(args.settings)["model"]
    few = model["name_or_path"] == BUILT_IN
    plans = {
        name: chat_plan([*args.settings, *words, *(FEW_LAYERS.get(name, ()) if few else ())])
        for name, words in TWO_TURNS.items()
    }

    import vzip
    from vzip.report.figures.figure_7 import Method, ask, draw

    arguments, compressor, system_prompt = plans["vanilla"]
    vlm = vzip.load_vlm(**arguments, compressor=compressor)
    methods = [Method(label, plan[1], plan[0]["pruner"]) for label, plan in plans.items()]
    for method in methods:  # what does not fit is refused before anything is asked
        vlm.compressor, vlm.pruner = method.compressor, method.pruner
    dialogues = (_own_dialogues(paths, prompts) if paths else _built_in_dialogues())[:limit]
    asked: list[Asked] = []
    with Progress(f"two turns under {len(methods)} methods", "dialogues", len(dialogues)) as progress:
        for dialogue in progress.track(dialogues):
            try:
                asked += [ask(vlm, method, dialogue, max_new_tokens, system_prompt) for method in methods]
            except (ImageError, MissingPackageError) as error:
                logger.warning("left out: %s", error)
    if not asked:
        raise ImageError(f"none of {len(dialogues)} images can be used.")
    return draw(asked, str(model["name"]))


def _own_dialogues(paths: Sequence[Path], prompts: Sequence[str]) -> list[Dialogue]:
    from vzip.report.figures.figure_7 import Dialogue

    pairs = list(zip(prompts[::2], prompts[1::2], strict=True))
    return [Dialogue(str(path), partial(load_image, path), *pair) for path in paths for pair in pairs]


def _built_in_dialogues() -> list[Dialogue]:
    """Of the built-in benchmark: a thing's colour or shape, then the word on the sign, which is elsewhere."""
    from vzip.demo.benchmark import prepare
    from vzip.demo.sweep import by_image
    from vzip.report.figures.figure_7 import Dialogue

    folder, found = prepare(), []
    for rows in by_image(folder):
        of_task = {task: row for task, row in reversed(rows)}
        if "attributes" in of_task and "reading" in of_task:
            first, second = of_task["attributes"], of_task["reading"]
            load = partial(load_image, folder / second["image"])
            found.append(Dialogue(second["image"], load, first["question"], second["question"], second["answer"]))
    return found


FIGURES: Mapping[str, FigureCommand] = {
    "1": FigureCommand(figure_1, frozenset({"runs"})),
    "4": FigureCommand(figure_4, frozenset({"runs"})),
    "7": FigureCommand(figure_7, frozenset({"images", "prompts", "limit", "max_new_tokens"})),
    "8": FigureCommand(video_figure.figure, video_figure.OPTIONS),
    **{
        str(number): FigureCommand(
            partial(attention_figures.figure, number, _config), attention_figures.options_of(number)
        )
        for number in attention_figures.NUMBERS
    },
}
