"""Measures what serving gains: requests a second, first and later tokens, cache blocks, with and without compression.

  python -m vzip bench serve                                          the built-in model, 64 visual tokens
  python -m vzip bench serve concurrency=1,8 repeats=5 num_requests=40
  python -m vzip bench serve model=llava15_7b budget=64tok engine.max_model_len=2048

Two engines of vLLM in one process take turns. It needs vLLM: .venv-vllm/bin/python -m vzip bench serve, where
`make .venv-vllm` has made that environment. Questions and images are those of the built-in benchmark.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from vzip.bench import serving
from vzip.bench.serving import COMPRESSED, STOCK, ServingSettings
from vzip.config.serving import ServePlan, check_vllm, serve_plan
from vzip.errors import ConfigError, MissingPackageError, RunExistsError
from vzip.keys import describe
from vzip.progress import Progress
from vzip.results.files import check_writable
from vzip.results.owner import owning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    keys = "\n".join(describe(serving.KEYS, defaults=serving.shown_defaults()))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for serve, and the settings below")
    parser.epilog = (
        "model=NAME|DIR|HUB ID [tiny], compressor, budget and model.KEY: as for `vzip serve`;"
        f" engine.KEY: arguments of vllm.LLM\n\nkeys [default]:\n{keys}"
    )


def main(args: argparse.Namespace) -> int:
    """Measures, prints the table and writes ``serve.json`` and ``serve.png``.

    Raises:
        VzipError: for anything the user can mend, before an engine is started or anything is written.
    """
    settings, words = serving.parse(args.overrides)
    named = [word.partition("=")[2] for word in words if word.startswith("model=")]
    if len(named) > 1:
        raise ConfigError(f"model is given twice: {', '.join(named)}. A measurement is of one.")
    words = [word for word in words if not word.startswith("model=")]
    model = named[-1] if named else "tiny"
    plan = serve_plan(model, words)
    if plan.dry_run:
        raise ConfigError("dry_run=true: is `serve`'s, which shows its line; a measurement has none. Leave it out.")
    if plan.settings["budget"] is None:
        raise ConfigError("compressor=none: both engines would be the same; name a compressor and a budget.")
    if settings.stock == "vzip":
        stock = serve_plan(model, [*_without_method(words), "compressor=none", "budget=full"]).hf_overrides
    else:
        stock = {}
    label = _label(plan)
    directory = Path(settings.out).expanduser() if settings.out != "auto" else _directory(model, label)
    path = directory / "serve.json"
    if path.exists() and not settings.overwrite:
        raise RunExistsError(
            f"{directory} already holds a {path.name}; give another one as out=DIR, or overwrite=true to replace it"
        )
    version = check_vllm()
    check_writable(directory)
    with owning(directory, "out=DIR"):
        result = _measure(settings, plan, stock, model, label, version)
        console = Console()
        console.print(serving.table(result))
        for line in serving.summary(result):
            console.print(f"  {line}", highlight=False, soft_wrap=True)
        result.write(path)
        console.print(f"wrote {path}", highlight=False)
        try:
            serving.write_plot(result, directory / "serve.png")
        except MissingPackageError as error:
            console.print(f"no plot: {error}", highlight=False)
        else:
            console.print(f"wrote {directory / 'serve.png'}", highlight=False)
    return 0


def _without_method(words: list[str]) -> list[str]:
    groups = ("compressor", "budget")
    return [word for word in words if word.partition("=")[0].partition(".")[0] not in groups]


def _label(plan: ServePlan) -> str:
    own, budget = dict(plan.settings["compressor"]), plan.settings["budget"]
    name = own.pop("name")
    from vzip.methods import find_method

    return f"{find_method(name).label(own)}-{sum(budget.values())}tok"


def _directory(model: str, label: str) -> Path:
    return Path("runs", "bench", Path(model).name, f"serve-{label}")


def _measure(
    settings: ServingSettings, plan: ServePlan, stock: Mapping[str, Any], model: str, label: str, version: str
) -> serving.ServingResult:
    # Engines in this process: two of them take turns, and their cache blocks can be counted.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB of each; else the first takes most of the memory
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a GPU is looked for in a way that vLLM can fork after
    import torch

    from vzip.bench.run import environment

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Of a GPU each engine would take nearly all, and the second would not start.
    shared = {"gpu_memory_utilization": 0.45} if device.type == "cuda" else {}
    arguments = {**shared, **_as_arguments(plan.options), "block_size": settings.block_size, **settings.engine}
    sides = {STOCK: stock, COMPRESSED: plan.hf_overrides}
    total = len(sides) * len(settings.concurrency) * settings.repeats
    requests = _requests(plan.checkpoint, arguments.get("revision"), settings)
    with Progress("measuring", "rounds", total) as progress:
        engines = {
            name: serving.VllmEngine(plan.checkpoint, {**arguments, "hf_overrides": dict(overrides)})
            for name, overrides in sides.items()
        }
        found = serving.measure_sides(engines, requests, settings, lambda: progress.advance(1))
    few = requests[: serving.NUM_WARMUP]
    methods = {
        name: serving.SideResult(levels, blocks, engines[name].num_kv_blocks, engines[name].prompt_tokens(few))
        for name, (levels, blocks) in found.items()
    }
    return serving.ServingResult(
        model=model,
        settings={**vars(settings), "model": model},
        resolved={
            "compressed": label,
            "hf_overrides": {name: dict(overrides) for name, overrides in sides.items()},
            "arguments": arguments,
            "dtype": str(engines[STOCK].llm.model_config.dtype).removeprefix("torch."),
            "device": device.type,
            "vllm": version,
        },
        environment=environment(device),
        methods=methods,
        notes=["questions and images of the built-in benchmark; every answer of the same length (ignore_eos)"],
    )


def _as_arguments(options: tuple[str, ...]) -> dict[str, str]:
    """The line's own options as arguments of ``vllm.LLM``: pairs of an option and its value."""
    return {k.lstrip("-").replace("-", "_"): v for k, v in zip(options[::2], options[1::2], strict=True)}


def _requests(checkpoint: str, revision: str | None, settings: ServingSettings) -> list[dict[str, Any]]:
    """As many different images as the largest round has, each with a question, as vLLM takes them."""
    import numpy as np
    from transformers import AutoProcessor

    from vzip.demo.questions import existence_questions
    from vzip.demo.render import render
    from vzip.demo.scenes import TEST_SEEDS, sample_scene
    from vzip.demo.sweep import turns

    processor = AutoProcessor.from_pretrained(checkpoint, revision=revision, trust_remote_code=False)
    rng = np.random.RandomState(settings.seed)
    found = []
    for seed in range(TEST_SEEDS[0], TEST_SEEDS[0] + max(map(settings.num_requests_at, settings.concurrency))):
        scene = sample_scene(seed)
        asked = existence_questions(scene, rng)[0].text
        prompt = processor.apply_chat_template(turns({"question": asked}), add_generation_prompt=True, tokenize=False)
        found.append({"prompt": prompt, "multi_modal_data": {"image": render(scene)}})
    return found
