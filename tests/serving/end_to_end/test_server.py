"""The real OpenAI-compatible server on loopback, started by `python -m vzip serve`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serving.end_to_end import engines

import vzip
from vzip.config.options import config_dir
from vzip.models.hub import built_in_folder
from vzip.serving import embeddings

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.serve
ROOT = config_dir().parent
START_S = 1200  # of a machine that is busy with other things
NUM_REQUESTS = 32
OPTIONS = ["--host=127.0.0.1", "--max-model-len=1024", "--block-size=32", "--max-num-seqs=32", "--enforce-eager"]
OPTIONS += ["--enable-mm-embeds", "--trust-request-mm-kwargs", "--served-model-name=tiny"]


class Server:
    """`python -m vzip serve` in a session of its own, which ends with all its processes."""

    def __init__(self, port: int, log: Path) -> None:
        self.port, self.log = port, log
        words = [sys.executable, "-m", "vzip", "serve", "tiny", "budget=64tok", *OPTIONS, f"--port={port}"]
        with log.open("ab") as out:
            self.process = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=out, start_new_session=True, env=_env())
        end = time.monotonic() + START_S
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)

    def is_up(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """Nothing of it is asked to end: as by a machine that runs out of memory."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=START_S
        )


def _env() -> dict[str, str]:
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return {**os.environ, **quiet}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(_free_port(), tmp_path_factory.mktemp("server") / "log.txt")
    yield started
    started.kill()


@pytest.fixture(scope="module")
def asked() -> list[engines.Asked]:
    return engines.scene_questions(NUM_REQUESTS)


def prompt_ids(vlm: vzip.CompressedVlm, text: str) -> Any:
    """As the server writes a chat of one image and one question."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = vlm.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return vlm.processor.tokenizer(prompt, return_tensors="pt")["input_ids"]


def answer_of(vlm: vzip.CompressedVlm, asked: engines.Asked) -> tuple[str, int]:
    """By ``CompressedVlm`` alone: the answer, and the tokens of the prompt."""
    ids = prompt_ids(vlm, asked.text)
    inputs = vlm.preprocess_images(asked.images)
    new = vlm.generate(ids, max_new_tokens=8, do_sample=False, questions=[asked.text], **inputs)
    length = vlm.prepare(ids, questions=[asked.text], **inputs).inputs_embeds.shape[1]
    return vlm.processor.tokenizer.decode(new[0], skip_special_tokens=True), length


async def ask(client: openai.AsyncOpenAI, part: dict[str, Any], text: str, **extra: Any) -> tuple[str, int]:
    """The server's answer, and the tokens of the prompt."""
    messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": text}]}]
    body = {"add_special_tokens": True, **extra}  # the chat endpoint leaves <s> out otherwise
    done = await client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0, extra_body=body
    )
    return done.choices[0].message.content or "", done.usage.prompt_tokens


def image_part(asked: engines.Asked) -> dict[str, Any]:
    png = io.BytesIO()
    asked.images[0].save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode('ascii')}"
    return {"type": "image_url", "image_url": {"url": url}}


def ask_all(server: Server, asked: list[engines.Asked]) -> list[tuple[str, int]]:
    async def together() -> list[tuple[str, int]]:
        async with server.client() as client:
            return await asyncio.gather(*(ask(client, image_part(each), each.text) for each in asked))

    return asyncio.run(together())


@pytest.fixture(scope="module")
def expected(asked: list[engines.Asked]) -> list[tuple[str, int]]:
    vlm = vzip.load_vlm("vzip/tiny", compressor=vzip.VisionZip(vzip.TokenBudget(**engines.BUDGET)))
    found = [answer_of(vlm, each) for each in asked]
    assert len({answer for answer, _ in found}) > NUM_REQUESTS // 3, "answers mixed up would not be seen"
    return found


def test_32_requests_at_once_each_get_their_own_answer(
    server: Server, asked: list[engines.Asked], expected: list[tuple[str, int]]
) -> None:
    assert ask_all(server, asked) == expected


def test_tokens_of_a_text_aware_method_are_taken_in_place_of_an_image(
    server: Server, asked: list[engines.Asked]
) -> None:
    vlm = vzip.load_vlm("vzip/tiny", compressor=vzip.MMTok(vzip.TokenBudget(**engines.BUDGET)))

    async def together() -> list[tuple[str, int]]:
        async with server.client() as client:
            parts = [
                embeddings.content_part(
                    vlm.encode_images(**vlm.preprocess_images(each.images), questions=[each.text])[0]
                )
                for each in asked[:8]
            ]
            return await asyncio.gather(
                *(ask(client, part, each.text) for part, each in zip(parts, asked[:8], strict=True))
            )

    assert asyncio.run(together()) == [answer_of(vlm, each) for each in asked[:8]]


def test_the_client_that_the_page_shows_gets_the_answer(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    command = next(line for line in page.splitlines() if line.startswith("python -m vzip embed docs/scene.png"))
    words = [str(tmp_path / word) if word == "scene.safetensors" else word for word in shlex.split(command)]
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=_env(), check=True, timeout=START_S)
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "OpenAI(" in block]
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace(":8000/", f":{server.port}/"), "docs/serve.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "air"


def test_more_than_the_servers_budget_is_a_bad_request_and_fewer_are_given(
    server: Server, asked: list[engines.Asked], expected: list[tuple[str, int]]
) -> None:
    async def one(**budget: int) -> tuple[str, int]:
        async with server.client() as client:
            return await ask(client, image_part(asked[0]), asked[0].text, mm_processor_kwargs={"vzip": budget})

    _, length = asyncio.run(one(num_dominant=27, num_contextual=5))
    assert length == expected[0][1] - 32
    with pytest.raises(openai.BadRequestError, match="asks for 70 visual tokens per crop: this server keeps 64"):
        asyncio.run(one(num_dominant=60, num_contextual=10))
    assert server.is_up() and ask_all(server, asked[:1]) == expected[:1]


def test_killed_in_the_middle_and_restarted_it_answers_again(
    server: Server, asked: list[engines.Asked], expected: list[tuple[str, int]]
) -> None:
    async def cut_off() -> list[Any]:
        async with server.client() as client:
            waiting = [asyncio.ensure_future(ask(client, image_part(each), each.text)) for each in asked]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            server.kill()
            return await asyncio.gather(*waiting, return_exceptions=True)

    ended = asyncio.run(cut_off())
    lost = [each for each in ended if isinstance(each, Exception)]
    assert lost and all(isinstance(each, openai.APIConnectionError) for each in lost)
    right = [(got, wanted) for got, wanted in zip(ended, expected, strict=True) if not isinstance(got, Exception)]
    assert all(got == wanted for got, wanted in right), "an answer is whole or none"
    again = Server(server.port, server.log)
    try:
        assert ask_all(again, asked) == expected
    finally:
        again.kill()


@pytest.mark.parametrize("by_vllm", [False, True])
def test_a_budget_that_does_not_fit_ends_the_start(by_vllm: bool) -> None:
    """Also where the line is written by hand, with the sentence in what vLLM prints."""
    if by_vllm:
        settings = '{"compressor": {"name": "visionzip"}, "budget": {"num_dominant": 590, "num_contextual": 10}}'
        overrides = f'{{"architectures": ["VzipLlavaForConditionalGeneration"], "vzip": {settings}}}'
        words = ["vllm.entrypoints.cli.main", "serve", str(built_in_folder()), "--hf-overrides", overrides, *OPTIONS]
    else:
        words = ["vzip", "serve", "tiny", "budget=600tok", *OPTIONS]
    done = subprocess.run(
        [sys.executable, "-m", *words, f"--port={_free_port()}"],
        cwd=ROOT,
        env=_env(),
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.returncode != 0 and (by_vllm or done.returncode == 2)
    assert re.search(r"600 visual tokens", done.stdout + done.stderr), done.stderr[-2000:]


def test_the_bench_measures_both_and_counts_blocks_as_by_the_formula(tmp_path: Path) -> None:
    words = ["bench", "serve", "concurrency=1,2", "num_requests=4", "repeats=1", "engine.enforce_eager=true"]
    words += ["engine.max_model_len=1024", f"out={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "vzip", *words], cwd=ROOT, env=_env(), capture_output=True, text=True, timeout=START_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "serve.json").read_text())
    for side in record["methods"].values():
        assert side["kv_blocks"] == [math.ceil((prompt + 8 - 1) / 32) for prompt in side["prompt_tokens"]]
        assert [len(level["ttft_ms"]) for level in side["levels"]] == [4, 4]
    stock, ours = record["methods"]["stock"], record["methods"]["compressed"]
    assert [a - b for a, b in zip(stock["prompt_tokens"], ours["prompt_tokens"], strict=True)] == [576 - 64] * 4
    assert record["ratios"]["kv_blocks"] > 5
