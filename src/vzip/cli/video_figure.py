"""Figure 8 for ``python -m vzip figure``: what is asked of which video, with how many frames under which method."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.config.build import chat_plan
from vzip.errors import ConfigError
from vzip.keys import raise_all
from vzip.paths import expanded, is_file
from vzip.progress import Progress

if TYPE_CHECKING:
    from PIL import Image

    from vzip.models.vlm import CompressedVlm
    from vzip.report.figures.drawing import Drawing
    from vzip.report.figures.figure_8 import Clip

OPTIONS = frozenset({"video", "prompt", "limit", "max_new_tokens"})
NUM_VIDEOS = 12
# Of the built-in model: frames and tokens of each, 576 in all.
BUILT_IN_ARMS = ((3, 192), (9, 64))
NUM_FRAMES = 9  # of a built-in video: three scenes, three frames each
VANILLA = ("compressor=none", "budget=full")
BUILT_IN = "vzip/tiny"


def figure(args: argparse.Namespace) -> Drawing:
    """Few whole frames, or many compressed ones, for as many visual tokens; raises before anything is loaded."""
    max_new_tokens = args.max_new_tokens or 64
    problems = [
        f"--{name.replace('_', '-')}={value}: must be 1 or more."
        for name in ("limit", "max_new_tokens")
        if (value := getattr(args, name)) is not None and value < 1
    ]
    if taken := [word for word in args.settings if word.split("=")[0].split(".")[0] in ("compressor", "pruner")]:
        problems.append(f"{' '.join(taken)}: figure 8 sets the methods itself: vanilla, VisionZip.")
    if (args.video is None) != (args.prompt is None):
        problems.append("--video and --prompt go together: a file, and what is asked about it.")
    elif args.video is not None and not is_file(args.video):
        problems.append(f"--video {args.video}: no such file.")
    raise_all(problems)
    vanilla = chat_plan([*_without_budget(args.settings), *VANILLA])
    name = vanilla[0]["name_or_path"]
    if args.video is not None:
        return _of_file(args, vanilla, max_new_tokens)
    if name != BUILT_IN:
        raise ConfigError(f"figure 8 of {name} needs --video FILE and --prompt TEXT; without them model=tiny is asked.")
    if any(word.startswith("budget") for word in args.settings):
        raise ConfigError("budget: figure 8 of the built-in model sets it: as many tokens for 1, 3 and 9 frames.")
    return _built_in(args, vanilla, args.limit or NUM_VIDEOS, args.max_new_tokens or 8)


def _without_budget(words: Sequence[str]) -> list[str]:
    return [word for word in words if not word.startswith("budget")]


def _built_in(args: argparse.Namespace, vanilla: Any, num_videos: int, max_new_tokens: int) -> Drawing:
    import vzip
    from vzip.report.figures.figure_8 import Arm, ask, draw, measure

    arguments, compressor, _ = vanilla
    methods = [chat_plan([*args.settings, "compressor=visionzip", f"budget={num}tok"])[1] for _, num in BUILT_IN_ARMS]
    vlm = vzip.load_vlm(**arguments, compressor=compressor)
    arms = [Arm("vanilla", compressor, 1)]
    arms += [Arm(f"VisionZip-{num}", m, few) for (few, num), m in zip(BUILT_IN_ARMS, methods, strict=True)]
    clips = scene_videos(num_videos)
    asked = []
    with Progress(f"{len(arms)} ways to see a video", "videos", len(clips)) as progress:
        for clip in progress.track(clips):
            asked += [ask(vlm, arm, clip, max_new_tokens) for arm in arms]
    note = (
        f"{len(clips)} videos of {NUM_FRAMES} frames, each three of the built-in benchmark's generated scenes in turn;"
        " what is asked about, a sign, is in the last scene alone, so the only frame that vanilla can afford does not"
        " show it. The model takes images, not videos: frames are several images of one prompt, which it was not"
        " trained on, so with many frames it may fail though it sees what is asked about"
    )
    return draw(arms, clips[0], asked, [measure(vlm, arm, clips[0]) for arm in arms], "built-in model", note)


def scene_videos(count: int) -> list[Clip]:
    """Videos whose last third shows a sign, drawn by number alone; the first two thirds are scenes without one."""
    from vzip.demo.render import render
    from vzip.demo.scenes import TEST_SEEDS, sample_scene
    from vzip.media.video import sample_indices
    from vzip.report.figures.figure_8 import Clip

    # Beyond the benchmark's own images, of the seeds that no training has seen.
    scenes = (sample_scene(seed) for seed in range(TEST_SEEDS[0] + 500_000_000, TEST_SEEDS[1]))
    plain: list[Any] = []
    signed: list[Any] = []
    while len(plain) < 2 * count or len(signed) < count:
        scene = next(scenes)
        (signed if scene.sign else plain).append(scene)

    def clip_of(number: int) -> Clip:
        shots = [render(scene) for scene in (*plain[2 * number : 2 * number + 2], signed[number])]
        frames = [shots[3 * n // NUM_FRAMES] for n in range(NUM_FRAMES)]

        def inputs(vlm: CompressedVlm, num_frames: int) -> dict[str, Any]:
            chosen = [frames[n] for n in sample_indices(NUM_FRAMES, num_frames)]
            content: list[dict[str, str]] = [{"type": "image"}] * len(chosen)
            return prompt_inputs(vlm, question, content, images=[chosen])

        answer = signed[number].sign.text.lower()
        question = f"What {'number' if answer.isdigit() else 'word'} is written on the sign?"
        name = f"scenes {number}"
        return Clip(
            name,
            inputs,
            NUM_FRAMES,
            lambda num: sample_indices(NUM_FRAMES, num),
            lambda index: [frames[n] for n in index],
            question,
            answer,
        )

    return [clip_of(number) for number in range(count)]


def prompt_inputs(
    vlm: CompressedVlm, question: str, content: list[dict[str, str]], system_prompt: str | None = None, **visuals: Any
) -> dict[str, Any]:
    """What a prompt with images or a video before its question becomes."""
    processor: Any = vlm.processor
    turns = [{"role": "system", "content": [{"type": "text", "text": system_prompt}]}] if system_prompt else []
    turns.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return vlm.build_inputs([text], **visuals)


def _of_file(args: argparse.Namespace, vanilla: Any, max_new_tokens: int) -> Drawing:
    from vzip.media.video import check_video, read_video, sample_indices

    path = expanded(args.video)
    check_video(path)
    method = chat_plan([*args.settings, "compressor=visionzip"])[1]

    import vzip
    from vzip.models.load import check_takes_videos
    from vzip.report.figures.figure_8 import Arm, Clip, ask, draw, measure

    arguments, compressor, system_prompt = vanilla
    check_takes_videos(arguments["name_or_path"], arguments["revision"])
    vlm = vzip.load_vlm(**arguments, compressor=compressor)
    few = vlm.num_frames
    if few is None:
        raise ConfigError(
            f"figure 8 counts frames, and {arguments['name_or_path']} takes a video by time: set model.num_frames=8."
        )
    many = frames_at_equal_cost(vlm, method, few)
    num_available = read_video(path, lambda number, _: [0]).num_available

    def inputs(vlm: CompressedVlm, num_frames: int) -> dict[str, Any]:
        vlm.num_frames = num_frames
        return prompt_inputs(vlm, args.prompt, [{"type": "video"}], system_prompt, videos=[[path]])

    def frames(index: Sequence[int]) -> Sequence[Image.Image]:
        return read_video(path, lambda number, _: list(index)).frames

    clip = Clip(path.name, inputs, num_available, lambda num: sample_indices(num_available, num), frames, args.prompt)
    arms = [
        Arm("vanilla", compressor, few),
        Arm("VisionZip, as few", method, few),
        Arm("VisionZip", method, many),
    ]
    with Progress(f"{len(arms)} ways to see {path.name}", "answers", len(arms)) as progress:
        asked = [ask(vlm, arm, clip, max_new_tokens) for arm in progress.track(arms)]
    costs = [measure(vlm, arm, clip) for arm in arms]
    return draw(
        arms,
        clip,
        asked,
        costs,
        Path(arguments["name_or_path"]).name,
        f"{path.name} of {num_available} frames, one question",
    )


def frames_at_equal_cost(vlm: CompressedVlm, method: Any, num_frames: int) -> int:
    """How many frames a method has for the visual tokens that so many have without it; never fewer than these.

    The most that the family takes: Video-LLaVA's published tower sees clips of 8.
    """
    (shape,) = vlm.adapter.read_inputs(**vlm.adapter.blank_videos(1, num_frames)).videos
    many = num_frames * shape.num_vanilla // method.num_visual_tokens(shape)
    for number in range(many, num_frames, -1):
        try:
            vlm.adapter.check_options(vlm.adapter.options, number)
        except ConfigError:
            continue
        return number
    return num_frames
