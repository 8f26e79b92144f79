"""Lets a judge model score a finished run's answers to open questions, and writes that into its record.

The video benchmarks, MM-Vet (mmvet_direct) and LLaVA-Bench (llava_bench_wild) have no other score.

  python -m vzip judge runs/paper_video/video_llava_7b_136tok/visionzip-17tok/seed0
  python -m vzip judge RUN --model gpt-3.5-turbo-0125 --price-in 0.5 --price-out 1.5 --max-cost 10 --yes
  python -m vzip judge RUN --model my-model --base-url http://localhost:8000/v1     any OpenAI-compatible endpoint

The key is read from the environment variable OPENAI_API_KEY. What it will cost is shown first. Replies are kept: after
an interruption the same command goes on where it stopped. Scores of different judge models are not comparable.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vzip.data.llava_index import cache_folder
from vzip.errors import ConfigError, JudgeError
from vzip.report.record import metrics_of, score_of

from .judge import Judge, Message, Reply
from .judge_cache import ReplyCache
from .judge_record import JudgedRun, check_not_judged, cost, read_run, unusable, write_verdicts
from .judge_settings import OFFICIAL_URL, JudgeSettings, read_key
from .judge_tasks import JudgedTask, judged_task

_CHARACTERS_PER_TOKEN = 4  # of English text, roughly
_TOKENS_PER_MESSAGE = 4
_NUM_NAMED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m vzip judge`."""
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument(
        "--model", help="the judge; name a dated version (the one that the benchmark's own script asks)"
    )
    parser.add_argument("--base-url", default=OFFICIAL_URL, help=f"OpenAI-compatible endpoint ({OFFICIAL_URL})")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the judge (0)")
    parser.add_argument("--tasks", help="which of the run's tasks, by commas; by default all that have a judge")
    parser.add_argument("--workers", type=int, default=8, help="requests at once (8)")
    parser.add_argument("--price-in", type=float, help="price of a million tokens that are sent")
    parser.add_argument("--price-out", type=float, help="price of a million tokens that come back")
    parser.add_argument("--max-cost", type=float, help="spend no more than this; needs both prices")
    parser.add_argument("--yes", action="store_true", help="do not ask before it starts")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier verdicts in the record")
    parser.add_argument("--cache", type=Path, help="file of replies (judge.sqlite in $VZIP_CACHE or ~/.cache/vzip)")


def main(args: argparse.Namespace, console: Console | None = None) -> int:
    """Judges and prints. Returns 1 if a question got no usable verdict."""
    console = console or Console(markup=False, highlight=False)
    prices = _prices(args)
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: must be 1 or more.")
    key = read_key(JudgeSettings(args.model or "any", args.base_url))
    kinds: dict[JudgedTask, list[str]] = {}
    for name in read_run(args.run, args.tasks.split(",") if args.tasks else None).tasks:
        kinds.setdefault(judged_task(name), []).append(name)
    settings = {
        kind: JudgeSettings(args.model or kind.model, args.base_url, args.temperature, kind.max_tokens)
        for kind in kinds
    }
    for kind, tasks in kinds.items():  # all are checked before any is asked
        check_not_judged(read_run(args.run, tasks), settings[kind], kind.prompt, overwrite=args.overwrite)
    codes = [
        _judge(kind, read_run(args.run, tasks), settings[kind], key, prices, args, console)
        for kind, tasks in kinds.items()
    ]
    return max(codes)


def _judge(
    kind: JudgedTask,
    run: JudgedRun,
    settings: JudgeSettings,
    key: str | None,
    prices: Mapping[str, float] | None,
    args: argparse.Namespace,
    console: Console,
) -> int:
    """Judges the tasks that are judged alike."""
    chats = [kind.chat(row) for row in run.questions()]
    cache_path = args.cache or cache_folder() / "judge.sqlite"
    with (
        closing(ReplyCache(cache_path)) as cache,
        closing(Judge(settings, cache, key=key, num_workers=args.workers)) as judge,
    ):
        if not _agreed(judge, kind, chats, prices, args, console):
            console.print("not started; nothing was sent.")
            return 0
        replies = _ask(judge, kind, chats, prices, args.max_cost, console)
    write_verdicts(run, replies, settings, kind.prompt)
    return _report(run, console)


def _prices(args: argparse.Namespace) -> dict[str, float] | None:
    given = {"in": args.price_in, "out": args.price_out}
    for name, value in (("--price-in", args.price_in), ("--price-out", args.price_out), ("--max-cost", args.max_cost)):
        if value is not None and not value >= 0:
            raise ConfigError(f"{name} {value}: must be 0 or more.")
    if None not in given.values():
        return given
    if args.max_cost is not None or set(given.values()) != {None}:
        raise ConfigError("--price-in and --price-out: give both, each for a million tokens; --max-cost needs them.")
    return None


def _agreed(
    judge: Judge,
    kind: JudgedTask,
    chats: Sequence[Sequence[Message]],
    prices: Mapping[str, float] | None,
    args: argparse.Namespace,
    console: Console,
) -> bool:
    """Says what it will cost, and asks."""
    new = [chat for chat in chats if judge.known(chat, kind.usable) is None]
    tokens_in, tokens_out = sum(map(estimate_tokens, new)), kind.num_reply_tokens * len(new)
    settings, prompt = judge.settings, kind.prompt
    console.print(f"judge: {settings.model} at {settings.base_url}, prompt {prompt.name}_v{prompt.version}")
    console.print(f"{len(chats)} answers, {len(chats) - len(new)} of them judged before (in {judge.cache.path})")
    if not new:
        return True
    estimate = f"to be sent: about {tokens_in:,} tokens, to come back: about {tokens_out:,}"
    if prices is None:
        console.print(f"{estimate}; cost unknown (give --price-in and --price-out)")
    else:
        expected = cost(tokens_in, tokens_out, prices)
        console.print(f"{estimate}; cost: about {expected:.2f} at {prices['in']:g} and {prices['out']:g} a million")
        if args.max_cost is not None and expected > args.max_cost:
            raise JudgeError(f"about {expected:.2f} is more than --max-cost {args.max_cost:g}. Nothing was sent.")
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to ask whether to start: add --yes. Nothing was sent.")
    return input("start? [y/N] ").strip().lower() in ("y", "yes")


def estimate_tokens(chat: Sequence[Message]) -> int:
    """Tokens of a chat, roughly: by its characters, since every endpoint has a tokenizer of its own."""
    return sum(len(message["content"]) // _CHARACTERS_PER_TOKEN + _TOKENS_PER_MESSAGE for message in chat)


def _ask(
    judge: Judge,
    kind: JudgedTask,
    chats: Sequence[Sequence[Message]],
    prices: Mapping[str, float] | None,
    max_cost: float | None,
    console: Console,
) -> list[Reply]:
    """All replies, with a bar.

    Raises:
        JudgeError: the endpoint failed for good, or more was spent than allowed; what has come is kept.
    """
    sent = received = num_done = 0
    columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    def count(number: int, reply: Reply) -> None:
        nonlocal sent, received, num_done
        num_done += 1
        # An endpoint that does not count is taken at our own estimate.
        sent += reply.num_prompt_tokens or (0 if reply.cached else estimate_tokens(chats[number]))
        received += reply.num_reply_tokens or (0 if reply.cached else kind.num_reply_tokens)
        bar.advance(task)
        if prices is not None and max_cost is not None and (spent := cost(sent, received, prices)) > max_cost:
            raise JudgeError(f"{spent:.2f} were spent, more than --max-cost {max_cost:g}")

    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(chats))
        try:
            replies = judge.ask_all(chats, kind.usable, count)
        except JudgeError as error:
            raise JudgeError(
                f"{error}. {num_done} of {len(chats)} answers are judged and kept in {judge.cache.path}; the record is"
                " as it was. Run the same command again to go on."
            ) from error
    spent = "" if prices is None else f", {cost(sent, received, prices):.2f} spent"
    console.print(f"{sent:,} tokens sent, {received:,} came back{spent}")
    return replies


def _report(run: JudgedRun, console: Console) -> int:
    table = Table("task", "metric", title=str(run.path.parent), title_justify="left")
    for name in ("score", "± s.e.", "answers"):
        table.add_column(name, justify="right")
    table.add_column("")
    for task in run.tasks:
        judging = run.record["judge"][task]
        for metric in metrics_of(run.record, task):
            score = score_of(run.record, task, metric)
            assert score is not None
            judged = metric.startswith("judge_")
            error = "" if score.standard_error is None else f"{score.standard_error:.4g}"
            num = judging["num_judged"] if judged else score.num_samples
            table.add_row(
                task, metric, f"{score.value:.4g}", error, str(num), "" if judged else "not the paper's metric"
            )
    console.print(table)
    failed = {task: unusable(run, task) for task in run.tasks}
    for task, named in failed.items():
        if named:
            console.print(f"{task}: {len(named)} answers have no usable verdict and count as neither right nor wrong:")
            for line in named[:_NUM_NAMED]:
                console.print(f"  {line}")
            if len(named) > _NUM_NAMED:
                console.print(f"  and {len(named) - _NUM_NAMED} more, in samples.jsonl. Run it again to ask once more.")
    return 1 if any(failed.values()) else 0
