"""Which tasks a judge model scores after the run (`python -m vzip judge`), what it is asked, what a reply is worth."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vzip.evaluation.benchmarks.protocol import Unit
from vzip.evaluation.benchmarks.video_qa import VIDEO_SETS
from vzip.results.record import JUDGE_ACCURACY, JUDGE_SCORE

from .judge_prompts import VIDEO_PROMPT, JudgePrompt, read_prompt, read_verdict

# What a benchmark's task keeps of a question for its judge, among the scores of samples.jsonl.
JUDGE_CONTEXT = "judge_context"
_NUMBER = re.compile(r"\d+(?:\.\d+)?")

Row = Mapping[str, Any]
Scores = dict[str, Any]


@dataclass(frozen=True)
class JudgedTask:
    """How one benchmark is judged.

    Attributes:
        prompt_name: of its prompt, see ``judge_prompts.read_prompt``.
        model: the judge by default; which of its versions answers is the endpoint's choice, and is recorded.
        max_tokens: of a reply, at most.
        num_reply_tokens: of a reply, to estimate the cost.
        metrics: what ``read`` gives, the primary one first.
        unit: of the primary metric.
        values: of a question, for the places of the prompt.
        read: a reply -> scores by metric, None where it cannot be read.
    """

    prompt_name: str
    model: str
    max_tokens: int
    num_reply_tokens: int
    metrics: tuple[str, ...]
    unit: Unit
    values: Callable[[Row], dict[str, str]]
    read: Callable[[str], Scores | None]

    @property
    def prompt(self) -> JudgePrompt:
        return read_prompt(self.prompt_name)

    def chat(self, row: Row) -> list[dict[str, str]]:
        """What the judge is asked about a row of ``samples.jsonl``."""
        return self.prompt.fill(**self.values(row))

    def usable(self, reply: str) -> bool:
        """Whether a reply can be read."""
        return self.read(reply) is not None


def judged_task(name: str) -> JudgedTask:
    """How a task is judged; open questions of one's own as the video benchmarks are."""
    return JUDGED_TASKS.get(name, _VIDEO)


def _plain(row: Row) -> dict[str, str]:
    return {"question": row["question"], "answer": str(row["target"]), "prediction": row["answer"]}


def _read_video(reply: str) -> Scores | None:
    verdict = read_verdict(reply)
    return None if verdict is None else {JUDGE_ACCURACY: float(verdict.correct), JUDGE_SCORE: float(verdict.score)}


def _mm_vet_values(row: Row) -> dict[str, str]:
    answer = row["target"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return _plain(row) | {"answer": answer}


def _read_mm_vet(reply: str) -> Scores | None:
    """A number from 0 to 1 at the beginning; in percent."""
    words = reply.split()
    if not words or not _NUMBER.fullmatch(words[0]) or not 0 <= float(words[0]) <= 1:
        return None
    return {JUDGE_SCORE: 100 * float(words[0])}


def _llava_bench_values(row: Row) -> dict[str, str]:
    return _plain(row) | {"context": row["scores"][JUDGE_CONTEXT]["context"]}


def _read_llava_bench(reply: str) -> Scores | None:
    """Two numbers from 1 to 10 in the first line: the reference's, then ours."""
    lines = reply.strip().split("\n")  # as the published script does; other line ends are part of a line
    found = [float(number) for number in _NUMBER.findall(lines[0])]
    if len(found) != 2 or not all(1 <= number <= 10 for number in found):
        return None
    return {JUDGE_SCORE: {"reference": found[0], "judged": found[1]}}


_VIDEO = JudgedTask(
    VIDEO_PROMPT, "gpt-3.5-turbo", 64, 20, (JUDGE_ACCURACY, JUDGE_SCORE), "fraction", _plain, _read_video
)

JUDGED_TASKS: dict[str, JudgedTask] = {
    **dict.fromkeys(VIDEO_SETS, _VIDEO),
    "mmvet_direct": JudgedTask(
        "mm_vet_v1", "gpt-4-0613", 8, 3, (JUDGE_SCORE,), "percent", _mm_vet_values, _read_mm_vet
    ),
    "llava_bench_wild": JudgedTask(
        "llava_bench_v1", "gpt-4", 1024, 250, (JUDGE_SCORE,), "percent", _llava_bench_values, _read_llava_bench
    ),
}
