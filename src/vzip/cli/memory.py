"""What a training needs on each device at its worst moment, and for what; nothing is loaded or downloaded.

  python -m vzip memory +exp=llava15_7b_64tok launcher=single_24gb    a training
  python -m vzip memory +exp=llava15_7b_64tok --inference             answering, eval.batch_size prompts at once
  python -m vzip memory +exp=llava15_7b_64tok --inference eval.batch_size=auto --device-gib 24     the batch that fits
  python -m vzip memory +exp=tiny_64tok --measure                     and a real step beside it

The overrides are train.py's. The step runs as it would, on tensors that have a shape and no content, so any model takes
seconds. By default every conversation is as long as train.max_length allows and all its text is learned: the worst that
can come. CUDA's own context (about half a GiB) comes on top.
"""

from __future__ import annotations

import argparse
from collections import Counter

from rich.console import Console
from rich.table import Table

from vzip.config import memory_plan
from vzip.config.memory_plan import NEW_TOKENS, MemoryPlan
from vzip.errors import ConfigError

GIB = 2**30
DOES_NOT_FIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="group=option, key=value, +exp=RECIPE")
    parser.add_argument("--inference", action="store_true", help="answering instead of training")
    parser.add_argument("--length", type=int, help="tokens of a conversation or prompt, visual ones counted")
    parser.add_argument("--new-tokens", type=int, help=f"of an answer (default: eval.gen_kwargs', or {NEW_TOKENS})")
    parser.add_argument("--device-gib", type=float, help="memory of a device: exit code 1 if this does not fit")
    parser.add_argument("--measure", action="store_true", help="do it once on this machine and print the peak beside")


def main(args: argparse.Namespace) -> int:
    plan = memory_plan.memory_plan(args.overrides, args.inference, args.length, args.new_tokens)
    if plan.fits_batch and (args.device_gib is None or args.measure):
        raise ConfigError(
            "eval.batch_size=auto: what fits depends on the device. Add --device-gib, without --measure, or name a"
            " number."
        )
    if args.measure:
        memory_plan.check_measurable(plan)
    if plan.fits_batch:
        plan, peak = memory_plan.estimate_fitting(plan, args.device_gib * GIB)
    else:
        peak = memory_plan.estimate(plan)
    console = Console()
    console.print(_title(plan), highlight=False)
    console.print(breakdown(peak))
    if args.measure:
        measured = memory_plan.measure(plan)
        off = peak.total() / measured - 1
        console.print(f"measured: {measured / GIB:.3f} GiB; the estimate is {off:+.1%} off", highlight=False)
    if args.device_gib is None:
        return 0
    room = args.device_gib - peak.total() / GIB
    verdict = f"fits, {room:.1f} GiB to spare" if room > 0 else f"does not fit, {-room:.1f} GiB are missing"
    console.print(f"{args.device_gib:g} GiB a device: {verdict}", highlight=False)
    return 0 if room > 0 else DOES_NOT_FIT


def breakdown(peak: Counter[str]) -> Table:
    """The table that is printed."""
    from vzip.bench.memory.live_bytes import PURPOSES

    table = Table("what for")
    table.add_column("GiB a device", justify="right")
    for purpose in dict.fromkeys((*PURPOSES, *peak)):
        table.add_row(purpose, f"{peak[purpose] / GIB:.3f}")
    table.add_section()
    table.add_row("total", f"{peak.total() / GIB:.3f}")
    return table


def _title(plan: MemoryPlan) -> str:
    load, launch = plan.load, plan.launch
    name = plan.config["recipe"] or plan.config["model"]["name"]
    about = f"{load.length} tokens ({plan.num_visual} of them visual)"
    count = load.num_images * load.num_dialogues
    if plan.train is None:
        return f"inference, {name}: {count} prompts of {about}, {load.num_new_tokens} new tokens each"
    return (
        f"training, {name}: {count} conversations of {about} on each of {plan.num_processes} devices,"
        f" strategy {launch.strategy}, gradient checkpointing {'on' if launch.gradient_checkpointing else 'off'}"
    )
