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
import contextlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from vzip.data.llava_index import cache_folder
from vzip.errors import ConfigError, JudgeError
from vzip.evaluation.benchmarks.judged import JudgedTask, judged_task
from vzip.evaluation.judge.cache import ReplyCache
from vzip.evaluation.judge.record import JudgedRun, open_tasks, read_run, unusable, write_verdicts
from vzip.evaluation.judge.settings import OFFICIAL_URL, JudgeSettings, read_key
from vzip.log import keeping
from vzip.progress import Progress
from vzip.results.owner import owning
from vzip.results.record import JUDGE_ACCURACY, JUDGE_SCORE, read_record, record_path, score_of

if TYPE_CHECKING:
    from vzip.evaluation.judge.client import Judge, Message, Reply

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


@dataclass
class _Job:
    """The tasks of a run that are judged alike; ``chats`` is what their judge is asked."""

    kind: JudgedTask
    judge: Judge
    tasks: list[str]
    chats: list[list[Message]]

    def new(self) -> list[list[Message]]:
        """The chats that no usable reply is kept of."""
        return [chat for chat in self.chats if self.judge.known(chat, self.kind.usable) is None]


@dataclass
class _Meter:
    """What was sent and received, and what it costs; ``prices`` None: not known."""

    prices: Mapping[str, float] | None
    max_cost: float | None
    num_sent: int = 0
    num_received: int = 0

    def add(self, reply: Reply, chat: Sequence[Message], kind: JudgedTask) -> None:
        """Counts a reply.

        Raises:
            JudgeError: more was spent than allowed.
        """
        if not reply.cached:  # an endpoint that does not count is taken at our own estimate
            self.num_sent += reply.num_prompt_tokens or estimate_tokens(chat)
            self.num_received += reply.num_reply_tokens or kind.num_reply_tokens
        if self.max_cost is not None and self.cost is not None and self.cost > self.max_cost:
            raise JudgeError(f"{self.cost:.2f} were spent, more than --max-cost {self.max_cost:g}")

    @property
    def cost(self) -> float | None:
        """In the currency of the prices."""
        if self.prices is None:
            return None
        return (self.num_sent * self.prices["in"] + self.num_received * self.prices["out"]) / 1e6


def main(args: argparse.Namespace, console: Console | None = None) -> int:
    """Judges and prints. Returns 1 if a question got no usable verdict."""
    console = console or Console(markup=False, highlight=False)
    prices = _prices(args)
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: must be 1 or more.")
    key = read_key(JudgeSettings(args.model or "any", args.base_url))
    read_record(args.run)
    with owning(record_path(args.run).parent, "the path of another run"):
        return _run(args, console, prices, key)


def _run(args: argparse.Namespace, console: Console, prices: Mapping[str, float] | None, key: str | None) -> int:
    run = read_run(args.run, args.tasks.split(",") if args.tasks else None)
    settings = {
        kind: JudgeSettings(args.model or kind.model, args.base_url, args.temperature, kind.max_tokens)
        for kind in map(judged_task, run.tasks)
    }
    run.tasks = open_tasks(run, settings, overwrite=args.overwrite)
    from vzip.evaluation.judge.client import Judge  # only here: it needs openai, the options above do not

    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(closing(ReplyCache(args.cache or cache_folder() / "judge.sqlite")))
        jobs = []
        for kind in dict.fromkeys(map(judged_task, run.tasks)):
            judge = stack.enter_context(closing(Judge(settings[kind], cache, key=key, num_workers=args.workers)))
            tasks = [task for task in run.tasks if judged_task(task) is kind]
            jobs.append(_Job(kind, judge, tasks, [kind.chat(row) for row in run.questions(tasks)]))
        if not _agreed(jobs, prices, args, console):
            console.print("not started; nothing was sent.")
            return 0
        meter = _Meter(prices, args.max_cost)
        for job in jobs:
            replies = _ask(job, meter)
            write_verdicts(run, job.tasks, replies, job.judge.settings, job.kind.prompt)
        spent = "" if meter.cost is None else f", {meter.cost:.2f} spent"
        console.print(f"{meter.num_sent:,} tokens sent, {meter.num_received:,} came back{spent}")
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
    jobs: Sequence[_Job], prices: Mapping[str, float] | None, args: argparse.Namespace, console: Console
) -> bool:
    """Says what all of it will cost, and asks."""
    estimate = _Meter(prices, None)
    for job in jobs:
        new, settings, prompt = job.new(), job.judge.settings, job.kind.prompt
        estimate.num_sent += sum(map(estimate_tokens, new))
        estimate.num_received += job.kind.num_reply_tokens * len(new)
        console.print(f"judge: {settings.model} at {settings.base_url}, prompt {prompt.name}_v{prompt.version}")
        console.print(
            f"{len(job.chats)} answers ({', '.join(job.tasks)}), {len(job.chats) - len(new)} of them judged before (in"
            f" {job.judge.cache.path})"
        )
    if not estimate.num_sent:
        return True
    text = f"to be sent: about {estimate.num_sent:,} tokens, to come back: about {estimate.num_received:,}"
    if prices is None or estimate.cost is None:
        console.print(f"{text}; cost unknown (give --price-in and --price-out)")
    else:
        console.print(f"{text}; cost: about {estimate.cost:.2f} at {prices['in']:g} and {prices['out']:g} a million")
        if args.max_cost is not None and estimate.cost > args.max_cost:
            raise JudgeError(f"about {estimate.cost:.2f} is more than --max-cost {args.max_cost:g}. Nothing was sent.")
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to ask whether to start: add --yes. Nothing was sent.")
    return input("start? [y/N] ").strip().lower() in ("y", "yes")


def estimate_tokens(chat: Sequence[Message]) -> int:
    """Tokens of a chat, roughly: by its characters, since every endpoint has a tokenizer of its own."""
    return sum(len(message["content"]) // _CHARACTERS_PER_TOKEN + _TOKENS_PER_MESSAGE for message in chat)


def _ask(job: _Job, meter: _Meter) -> list[Reply]:
    """All replies, with a bar.

    Raises:
        JudgeError: the endpoint failed for good, or more was spent than allowed; what has come is kept.
    """
    with Progress("judging", "answers", len(job.chats)) as progress:

        def count(number: int, reply: Reply) -> None:
            progress.advance()
            meter.add(reply, job.chats[number], job.kind)

        of = f"of {len(job.chats)} answers are judged and kept in {job.judge.cache.path}"
        try:
            with keeping(lambda: f"{progress.done} {of}"):
                return job.judge.ask_all(job.chats, job.kind.usable, count)
        except JudgeError as error:
            reason, tasks = str(error).rstrip("."), ", ".join(job.tasks)
            num_kept = len(job.chats) - len(job.new())
            raise JudgeError(
                f"{reason}. {num_kept} of {len(job.chats)} answers ({tasks}) are judged and kept in"
                f" {job.judge.cache.path}; of these nothing is in the record yet. Run the same command again to go on."
            ) from error


def _report(run: JudgedRun, console: Console) -> int:
    table = Table("task", "metric", title=str(run.path.parent), title_justify="left")
    for name in ("score", "± s.e.", "answers"):
        table.add_column(name, justify="right")
    table.add_column("")
    for task in run.tasks:
        judging = run.record["judge"][task]
        metrics = run.record["tasks"][task]["metrics"]
        for metric in sorted(metrics, key=lambda name: name not in (JUDGE_ACCURACY, JUDGE_SCORE)):
            score = score_of(run.record, task, metric)
            assert score is not None
            judged = metric in (JUDGE_ACCURACY, JUDGE_SCORE)
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
