"""What an evaluation will do, told before anything is loaded, and all that can be checked without loading."""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.config.build import EvaluationPlan
from vzip.config.options import config_dir
from vzip.config.run_directory import methods_label
from vzip.config.validate import BUILT_IN, VIDEO
from vzip.errors import UnsupportedModelError, VzipError
from vzip.evaluation.benchmarks.judged import JUDGED_TASKS
from vzip.evaluation.benchmarks.protocols import protocol_of
from vzip.evaluation.benchmarks.question_counts import known_counts, num_questions
from vzip.option_files import FRACTIONS, is_fraction
from vzip.results.record import RECORD_NAME

if TYPE_CHECKING:
    from vzip.bench.shapes import BenchModel
    from vzip.compressors import Compressor

logger = logging.getLogger("vzip.eval")

_WIDTH = 118


def tell(plan: EvaluationPlan, briefly: bool = False) -> None:
    """Prints the plan to standard error, in the first of several processes only.

    Args:
        plan: the evaluation.
        briefly: in one line, for a job of a sweep.
    """
    if os.environ.get("RANK", "0") == "0":
        logger.info("%s", brief(plan) if briefly else preview(plan))


def preview(plan: EvaluationPlan) -> str:
    """The plan in about ten lines: model, method, benchmarks, visual tokens, judge, place of the record."""
    tasks, limit, run_dir = (plan.evaluation[key] for key in ("tasks", "limit", "run_dir"))
    listed = [f"{task} {_count(task, limit)}" for task in tasks]
    judged = [task for task in tasks if task in JUDGED_TASKS]
    model = plan.evaluation["resolved_config"]["model"]
    rows = {
        "model": f"{model['name']} ({plan.model['name_or_path']})",
        "method": _method(plan),
        "visual tokens": visual_tokens(plan),
        **({"pruner": pruned(plan)} if plan.pruner is not None else {}),
        "benchmarks": f"{_total(plan)}: {', '.join(listed)}",
        "judge": f"scores {', '.join(judged)} afterwards, by the next line" if judged else "not needed",
        **({"": f"python -m vzip judge {run_dir}"} if judged else {}),
        "record": str(run_dir / RECORD_NAME),
    }
    return "\n".join(["the plan:", *(_row(heading, text) for heading, text in rows.items())])


def _row(heading: str, text: str) -> str:
    start = f"  {heading:<15}"
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def brief(plan: EvaluationPlan) -> str:
    """The plan in one line."""
    model = plan.evaluation["resolved_config"]["model"]["name"]
    return f"{model}, {_method(plan)}, {visual_tokens(plan)}; {_total(plan)}; {plan.evaluation['run_dir']}"


def _method(plan: EvaluationPlan) -> str:
    config = plan.evaluation["resolved_config"]
    label, budget = methods_label(config, config_dir()), config["budget"]
    of_what = "a video (an image: a crop)" if plan.compressor.joins_frames else "a crop"
    if is_fraction(budget):
        shares = [f"{100 * budget[key]:g} %" for key in FRACTIONS]
        if plan.compressor.splits_budget:
            return f"{label}, {shares[0]} of the patches of {of_what} dominant + {shares[1]} contextual"
        return f"{label}, {100 * sum(budget[key] for key in FRACTIONS):g} % of the patches of {of_what}"
    if budget["num_dominant"] is None:
        return f"{label}, every visual token{'' if plan.pruner is None else ' enters the language model'}"
    if plan.compressor.is_vanilla and plan.pruner is not None:
        return f"{label}, every visual token enters the language model, {plan.pruner.budget} of an image on average"
    if plan.compressor.splits_budget:
        return f"{label}, {budget['num_dominant']} dominant + {budget['num_contextual']} contextual tokens {of_what}"
    number = budget["num_dominant"] + budget["num_contextual"]
    return f"{label}, {number} tokens {of_what}{', over the whole image' if plan.compressor.scope == 'image' else ''}"


def _count(task: str, limit: int | None) -> str:
    count = num_questions(task, limit)
    return "unknown" if count is None else f"{count:,}"


def _total(plan: EvaluationPlan) -> str:
    tasks, limit = plan.evaluation["tasks"], plan.evaluation["limit"]
    counts = [num_questions(task, limit) for task in tasks]
    known = [count for count in counts if count is not None]
    if not known:
        return f"{len(tasks)} with an unknown number of questions"
    limited = limit is not None and all(count == limit for count in known)
    exact = limited or all(known_counts().get(task, {}).get("exact") for task in tasks)
    word = "at least " if len(known) < len(counts) else "" if exact else "about "
    return f"{len(tasks)} with {word}{sum(known):,} questions"


def visual_tokens(plan: EvaluationPlan) -> str:
    """Visual tokens of an image (and a video) beside what the unmodified model has, as far as they are known now."""
    compressor = plan.compressor
    shape = _shape(plan.model)
    if shape is None:
        return f"{_varying(compressor)} of each crop; how many there are, its config.json will say"
    from vzip.media.video import DEFAULT_NUM_FRAMES
    from vzip.models.families import adapter_class_for_config
    from vzip.models.families.llava_onevision.adapter import video_shape

    adapter = adapter_class_for_config(shape.config)
    geometry = adapter.check_config(shape.config)
    _check_family(plan, shape.config)
    if geometry is None:
        steps = " (a video: each temporal step's)" if adapter.has_video and not compressor.joins_frames else ""
        return f"{_varying(compressor)} of an image's{steps}, which vary with its size"
    if compressor.joins_frames:
        return f"{_varying(compressor)} of a video's"
    units = geometry.shape().num_patches
    kept = None if compressor.is_vanilla else compressor.num_tokens(geometry.shape())
    if adapter.has_tiles:
        crops = replace(shape, medium="image").num_crops
        full = crops * units
        if kept is None:
            besides = " (newline tokens besides, padding cut off)" if geometry.unit_side == 1 else ""
            image = f"up to {full:,} = {crops} crops x {units} an image{besides}"
        else:
            newlines = " and newline tokens" if plan.model["row_newline"] else ""
            image = f"{kept * crops:,} = {crops} crops x {kept} an image{newlines}, of up to {full:,}"
        if not adapter.has_video:
            return image
        whole = video_shape(geometry.grid, plan.model["num_frames"] or DEFAULT_NUM_FRAMES)
        counted = f"{compressor.num_visual_tokens(whole):,} of " if kept is not None else ""
        return f"{counted}{whole.num_vanilla:,} a video of {whole.num_crops} frames; {image}"
    image = _of(kept, units)
    if not adapter.has_video:
        return f"{image} an image"
    frames = plan.model["num_frames"] or shape.num_crops
    rows = units + int(geometry.has_cls)  # a frame keeps its CLS token, an image does not
    all_rows = f"{frames * rows:,}"
    if kept is None:
        return f"{all_rows} = {frames} frames x {rows} a video; {image} an image"
    video = f"{kept * frames:,} = {frames} frames x {kept}, of {all_rows}"
    return f"{video} a video; {image} an image"


def _check_family(plan: EvaluationPlan, config: Any) -> None:
    """Raises what loading the model would, as far as its configuration decides: a hub id's, too, if published."""
    from vzip.models.compiled import check_compiles, check_parts
    from vzip.models.families import FamilyOptions, adapter_class_for_config

    family, model = adapter_class_for_config(config), plan.model
    options = FamilyOptions(**{each.name: model[each.name] for each in fields(FamilyOptions)})
    family.check_positions(options, model["attn_implementation"])
    family.check_settings(config, plan.compressor, options, model["num_frames"])
    family.check_preprocess(model["preprocess"])
    check_compiles(
        check_parts(model["compile"]),
        family,
        config,
        plan.compressor,
        pruner=plan.pruner,
        attn_implementation=model["attn_implementation"],
        quantization=model["quantization"],
    )
    about_videos = [task for task in plan.evaluation["tasks"] if (found := protocol_of(task)) and found.video]
    if about_videos and not family.has_video:
        raise UnsupportedModelError(
            f"model={plan.evaluation['resolved_config']['model']['name']} takes no videos as files, and"
            f" {', '.join(about_videos[:3])}{' and others' if len(about_videos) > 3 else ''} of eval.tasks ask about"
            " videos. Choose a model that does (model=video_llava_7b, qwen2_5_vl_7b, llava_onevision_7b ...), or"
            " benchmarks of images (python -m vzip list eval)."
        )


def pruned(plan: EvaluationPlan) -> str:
    """The pruner and, where the number of visual tokens is known now, what its layers attend to on average."""
    from vzip.models.families import adapter_class_for_config

    assert plan.pruner is not None
    shape = _shape(plan.model)
    geometry = None if shape is None else adapter_class_for_config(shape.config).check_config(shape.config)
    if shape is not None:
        adapter_class_for_config(shape.config).check_pruner(shape.config, plan.pruner)  # a budget that it cannot meet
    if shape is None or geometry is None or adapter_class_for_config(shape.config).has_tiles:
        return str(plan.pruner)
    entering = plan.compressor.num_tokens(geometry.shape())
    average = plan.pruner.average(entering, shape.config.get_text_config().num_hidden_layers)
    return f"{plan.pruner}" + ("" if average is None else f": {average:.1f} an image on average over the layers")


def _varying(compressor: Compressor) -> str:
    """What a compressor keeps of an image whose size is not known."""
    from vzip.compressors import FractionBudget, TokenBudget

    if compressor.is_vanilla:
        return "all"
    budget: object = getattr(compressor, "budget", None)
    if isinstance(budget, FractionBudget):
        return f"{100 * (budget.dominant + budget.contextual):g} %"
    return f"up to {budget.num_tokens}" if isinstance(budget, TokenBudget) else "some"


def _of(kept: int | None, full: int) -> str:
    return f"all {full:,}" if kept is None else f"{kept} of {full:,}"


def _shape(model: Mapping[str, Any]) -> BenchModel | None:
    """The model's configuration if it is known here: a published model's, or that of a directory."""
    from vzip.bench.shapes import name_of, resolve
    from vzip.models.load import resolve_checkpoint

    published = name_of(model["name_or_path"])
    source = published or resolve_checkpoint(model["name_or_path"])
    return resolve(str(source)) if published or isinstance(source, Path) else None


def check_without_loading(plan: EvaluationPlan) -> None:
    """What ``dry_run=true`` checks beyond the configuration: tasks, packages, the video benchmarks' files.

    That this machine lacks the devices is told and no error: the run may be meant for another one.

    Raises:
        VzipError: for what the run itself would refuse.
    """
    from vzip.demo.benchmark import TASK_NAMES
    from vzip.evaluation.benchmarks import video_qa
    from vzip.evaluation.benchmarks.catalog import check_packages
    from vzip.evaluation.benchmarks.question_groups import check_limit
    from vzip.evaluation.lmms_eval.harness import check_lmms_eval
    from vzip.evaluation.run import check_run_dir
    from vzip.results.wandb_runs import check_wandb
    from vzip.train.distributed import check_devices

    evaluation = plan.evaluation
    check_run_dir(evaluation["run_dir"], overwrite=evaluation["overwrite"] or plan.finished is not None)
    check_lmms_eval()
    check_packages(evaluation["tasks"])
    if evaluation["trackers"]:
        check_wandb("eval.trackers")
    folder = evaluation["include_path"]
    if folder == VIDEO:
        video_qa.check(plan.video_root, evaluation["tasks"])
    # The generated and the video benchmarks become task files only when they are run. With them, and without files of
    # the user's, a task that has a committed count is known; looking for others reads all of lmms-eval's task files.
    made: dict[str, Sequence[str]] = {BUILT_IN: TASK_NAMES, VIDEO: tuple(video_qa.VIDEO_SETS)}
    known = set(known_counts()) - {name for names in made.values() for name in names} | set(made.get(folder, ()))
    own_files = folder is not None and folder not in made
    sought = [task for task in evaluation["tasks"] if own_files or task not in known]
    if sought:
        plan.check_tasks(folder if own_files else None, sought)
    check_limit(evaluation["tasks"], evaluation["limit"])
    try:
        check_devices(plan.launch)
    except VzipError as error:
        logger.warning("not on this machine: %s", error)


def stop_dry(plan: EvaluationPlan) -> None:
    """Ends ``dry_run=true``: checks and says so."""
    check_without_loading(plan)
    logger.info("dry_run=true: checked; nothing was loaded or written")
