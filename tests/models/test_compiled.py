"""``compile=``: the same answers from graphs of few shapes, and what cannot be compiled refused by name.

Most tests let Dynamo capture whole graphs and guard their shapes, and run them uncompiled (``eager``), which takes
seconds; what the compiler makes of them is the slow test's.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from tests import tiny, tiny_qwen, tiny_qwen3
from tests.tiny import IMAGE_TOKEN
from torch._dynamo.utils import counters
from transformers import LlavaForConditionalGeneration

import vzip
from vzip.bench.settings import BenchSettings, parse
from vzip.errors import ConfigError, MissingPackageError
from vzip.models import compiled
from vzip.models.compiled import PARTS, bucket, check_compiler, check_compiles, check_parts, check_spread, filled
from vzip.models.families import LlavaAdapter, Qwen3VlAdapter

COMPRESSOR = vzip.VisionZip(vzip.TokenBudget(6, 3))
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small() -> Any:
    """One layer of the language model, one of the tower that runs: Dynamo's time is by layers."""
    return tiny.llava(vocab_size=320, num_layers=2, num_text_layers=1)


def wrapped(parts: str | None = None, model: Any = None, **settings: Any) -> vzip.CompressedVlm:
    model = small() if model is None else model
    return vzip.CompressedVlm(model, COMPRESSOR, compile=parts, **settings)


def prompts(num: int, length: int) -> dict[str, torch.Tensor]:
    """So many prompts of an image each, the later ones shorter."""
    ids = torch.randint(5, 300, (num, length), generator=torch.Generator().manual_seed(100 * num + length))
    ids[:, -2] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    for row in range(1, num):
        mask[row, :row] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": tiny.pixels(num, seed=length)}


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_buckets_hold_every_length_with_little_padding() -> None:
    lengths = range(1, 5000)
    assert all(bucket(n) >= n and bucket(n) % 16 == 0 and bucket(bucket(n)) == bucket(n) for n in lengths)
    assert all(bucket(n) <= bucket(n + 1) for n in lengths)
    assert all(4 * (bucket(n) - n) < bucket(n) for n in lengths if n > 64)
    assert sorted({bucket(n) for n in range(1, 257)}) == [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    assert len({bucket(n) for n in range(100, 1001)}) == 14, "as docs/performance.md says"
    assert [filled(n) for n in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]


@pytest.mark.parametrize("parts", ["prefill", "decode", "tower+prefill+decode"])
def test_answers_are_those_of_the_plain_model(parts: str) -> None:
    plain, own = wrapped(), wrapped(parts)
    for num, length in ((1, 6), (3, 9)):
        inputs = prompts(num, length)
        assert own.generate(**inputs, **GREEDY).tolist() == plain.generate(**inputs, **GREEDY).tolist()
    assert own.last_num_visual_tokens == [9, 9, 9] and num_graphs() > 0
    assert wrapped().compiled_parts == () and own.compiled_parts == check_parts(parts)


def test_prompts_of_many_lengths_share_the_graphs_of_their_buckets() -> None:
    """Two buckets, a batch of one and a batch filled up to four, each with a cache of one length."""
    plain, own = wrapped(), wrapped("prefill+decode")
    shapes = set()
    for num in (1, 3, 4):
        for length in (5, 8, 17):
            inputs = prompts(num, length)
            assert own.generate(**inputs, **GREEDY).tolist() == plain.generate(**inputs, **GREEDY).tolist()
            padded = bucket(length + 8)
            shapes |= {("prefill", padded, filled(num)), ("decode", bucket(padded + 5), filled(num))}
    assert num_graphs() == len(shapes) == 8


def test_more_shapes_than_dynamo_allows_a_function_by_itself() -> None:
    own = wrapped("prefill")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for length in (5, 30):
            own.generate(**prompts(1, length), max_new_tokens=1, do_sample=False)
    assert num_graphs() == 2


@pytest.mark.parametrize("part", PARTS)
def test_more_shapes_than_any_graphs_are_worth_end_in_a_sentence(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_MAX_GRAPHS", 1)
    own = wrapped(part)
    own.generate(**prompts(1, 5), max_new_tokens=2, do_sample=False)
    with pytest.raises(ConfigError, match=f"model.compile: {part} met more than 1 shapes.*Take {part} out"):
        own.generate(**prompts(2, 30), max_new_tokens=2, do_sample=False)


def test_what_no_graph_can_hold_is_said_in_a_sentence() -> None:
    config = copy.deepcopy(small().config)
    config.text_config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}  # goes by the longest prompt so far
    own = wrapped("prefill", LlavaForConditionalGeneration(config).eval())
    with pytest.raises(ConfigError, match=r"model.compile: prefill is no single graph \(.*\). Take prefill out"):
        own.generate(**prompts(1, 8), **GREEDY)

    class OnTheHost(vzip.RandomTokens):
        def choose(self, vision: Any, num_tokens: int) -> torch.Tensor:
            return super().choose(vision, num_tokens) if vision.hidden.sum().item() else torch.arange(num_tokens)

    tower = vzip.CompressedVlm(small(), OnTheHost(vzip.TokenBudget(6, 3)), compile="tower")
    with pytest.raises(ConfigError, match=r"tower with compressor=OnTheHost is no single graph"):
        tower.encode_images(tiny.pixels(1))


def test_the_model_is_left_as_it_was() -> None:
    model = small()
    before = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    own = wrapped("tower+prefill+decode", model)
    own.generate(**prompts(2, 7), **GREEDY)
    assert [(name, sorted(vars(module))) for name, module in model.named_modules()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_drawn_answers_are_drawn_alike() -> None:
    drawn = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, "top_k": 50}
    answers = []
    for vlm in (wrapped(), wrapped("decode")):
        torch.manual_seed(3)
        answers.append(vlm.generate(**prompts(3, 8), **drawn).tolist())
    assert answers[0] == answers[1]


def test_answers_end_apart_and_are_streamed() -> None:
    plain, own = wrapped(), wrapped("prefill+decode")
    inputs = prompts(2, 8)
    long = plain.generate(**inputs, max_new_tokens=6, do_sample=False)
    ends = {"eos_token_id": int(long[0, 2]), "pad_token_id": 3, "max_new_tokens": 6, "do_sample": False}
    expected = plain.generate(**inputs, **ends).tolist()
    assert own.generate(**inputs, **ends).tolist() == expected and 3 in expected[0]

    class Heard:
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ended = 0

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ended += 1

    heard = Heard()
    one = prompts(1, 8)
    answer = own.generate(**one, **GREEDY, streamer=heard)
    assert heard.ids == answer[0].tolist() and heard.ended == 1


def test_options_that_look_at_the_prompt_see_it() -> None:
    settings = {**GREEDY, "repetition_penalty": 3.0, "no_repeat_ngram_size": 2}
    inputs = prompts(2, 12)
    assert wrapped("prefill+decode").generate(**inputs, **settings).tolist() == (
        wrapped().generate(**inputs, **settings).tolist()
    )


def test_eager_attention_gets_its_own_kind_of_mask() -> None:
    model = small()
    model.set_attn_implementation("eager")
    inputs = prompts(3, 7)
    expected = wrapped(None, model).generate(**inputs, **GREEDY)
    assert torch.equal(wrapped("prefill+decode", model).generate(**inputs, **GREEDY), expected)


def test_positions_in_three_axes_go_on_where_the_prompt_ended() -> None:
    model = tiny_qwen.build()
    inputs = tiny_qwen.batch(tiny_qwen.prompt(5, "4x8", 6, 7), tiny_qwen.prompt(8, "6x10", 9))
    inputs |= tiny_qwen.images("4x8", "6x10")
    compressor = vzip.VisionZip(vzip.TokenBudget(3, 2))
    plain, own = (vzip.CompressedVlm(model, compressor, compile=parts) for parts in (None, "prefill+decode"))
    assert own.generate(**inputs, **GREEDY).tolist() == plain.generate(**inputs, **GREEDY).tolist()


def test_a_batch_that_fails_leaves_no_cache_behind() -> None:
    own = wrapped("decode")
    language = own._language
    assert language is not None

    def broken(_ids: Any, _scores: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    own.generate(**prompts(1, 8), **GREEDY)
    (kept,) = language._spare
    with pytest.raises(torch.OutOfMemoryError):
        own.generate(**prompts(1, 8), **GREEDY, logits_processor=[broken])
    assert language._spare == []
    own.generate(**prompts(1, 8), **GREEDY)
    assert language._spare[0] is not kept


def test_encoding_is_compiled_wherever_the_wrapper_encodes() -> None:
    plain, own, pixels = wrapped(), wrapped("tower"), tiny.pixels(2)
    for mine, other in zip(own.encode_images(pixels), plain.encode_images(pixels), strict=True):
        torch.testing.assert_close(mine, other)
    assert num_graphs() == 1
    own.encode_images(tiny.pixels(2, seed=5))
    own.prepare(**prompts(2, 8))
    assert num_graphs() <= 2, "at most one more, without gradients"
    with torch.no_grad():
        own.prepare(torch.tensor([[1, 5, 6]]))  # no image: nothing to encode


LLAVA: dict[str, Any] = {"family": LlavaAdapter, "config": tiny.llava().config, "compressor": COMPRESSOR}


@pytest.mark.parametrize(
    ("parts", "given", "message"),
    [
        ("prefill+decode", {"pruner": vzip.FastV()}, "pruner=FastV: a pruner drops tokens through hooks"),
        ("decode", {"attn_implementation": "flash_attention_2"}, "Set attn_implementation=sdpa"),
        ("prefill", {"quantization": "4bit"}, "model.quantization=4bit: bitsandbytes' layers"),
        ("decode", {"family": Qwen3VlAdapter}, "takes rows of the vision tower at deeper layers through hooks"),
        ("tower", {"family": Qwen3VlAdapter}, "its images have any size"),
    ],
)
def test_what_cannot_be_compiled_is_refused(parts: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.compile={parts.replace('+', '.')}") as refused:
        check_compiles(check_parts(parts), **{**LLAVA, **given})
    assert message in str(refused.value)


def test_a_method_inside_the_tower_and_a_window_are_refused() -> None:
    from vzip.methods import find_method, method_names

    methods = [find_method(name) for name in method_names()]
    inside = [m for m in methods if m.build(vzip.TokenBudget(6, 3)).tower_use == "pruned"]
    assert inside, "FlowCut, at least"
    with pytest.raises(ConfigError, match="depends on the image"):
        check_compiles(("tower",), **{**LLAVA, "compressor": inside[0].build(vzip.TokenBudget(6, 3))})
    config = tiny.llava().config
    config.text_config.sliding_window = 8
    with pytest.raises(ConfigError, match=r"sliding_window=8\)"):
        check_compiles(("decode",), **{**LLAVA, "config": config})


def test_all_that_stands_against_it_is_named_at_once_before_weights_are_read(tmp_path: Path) -> None:
    model = tiny.llava()
    model.config.save_pretrained(tmp_path)  # no weights: nothing else than the refusal can come of it
    with pytest.raises(ConfigError, match="2 problems") as refused:
        vzip.load_vlm(tmp_path, compile=["prefill"], pruner=vzip.FastV(K=1), attn_implementation="flash_attention_2")
    assert "pruner=FastV" in str(refused.value) and "flash_attention_2" in str(refused.value)


def test_a_pruner_that_comes_later_is_refused_too() -> None:
    model = tiny.llava(num_layers=2)
    own = wrapped("decode", model)
    with pytest.raises(ConfigError, match="hooks, which are no part of a graph"):
        own.pruner = vzip.FastV(K=1, keep=4)
    assert own.pruner is None
    tower = wrapped("tower", model)
    tower.pruner = vzip.FastV(K=1, keep=4)  # the tower and a pruner have nothing to do with each other


def test_dialogues_beams_and_spread_models_are_refused() -> None:
    own = wrapped("tower")
    with pytest.raises(ConfigError, match="a dialogue grows by turns of any length"):
        own.chat()
    with pytest.raises(ConfigError, match=r"num_beams=2: must be 1; return_dict_in_generate=True"):
        wrapped("decode").generate(**prompts(1, 8), num_beams=2, return_dict_in_generate=True)
    with pytest.raises(ConfigError, match="spread over devices, or parts of it are parked elsewhere"):
        check_spread(("decode",), cpu_offload(small(), execution_device="cpu"))
    check_spread(("decode",), small())


@pytest.mark.parametrize("parts", ["towr", ["decode", "decode"], "prefill+x"])
def test_unknown_and_repeated_parts_are_refused(parts: Any) -> None:
    with pytest.raises(ConfigError, match="must be any of tower, prefill, decode, each once"):
        check_parts(parts)


def test_the_parts_are_the_same_everywhere() -> None:
    from vzip.config.schema import GROUPS

    assert check_parts("decode+tower") == ("tower", "decode") and check_parts(None) == ()
    assert GROUPS["model"]["compile"].rule.allows(list(PARTS)) and not GROUPS["model"]["compile"].rule.allows([])
    assert parse(["compile=tower,prefill,decode"]).compile == PARTS
    assert parse(["compile=decode"]).methods == ("vanilla", "vzip", "eager_maps", "compiled")
    assert BenchSettings().compile == ()
    with pytest.raises(ConfigError, match="give both or neither"):
        parse(["methods=compiled,vzip"])


@pytest.mark.parametrize(("device", "kind"), [("cpu", r"C\+\+"), ("cuda", "C")])
def test_a_missing_compiler_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch, device: str, kind: str) -> None:
    check_compiler((), torch.device(device))
    monkeypatch.setattr(compiled.sys, "platform", "linux")
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name if name == "clang++" else None)  # torch takes g++
    check_compiler((), torch.device(device))
    with pytest.raises(MissingPackageError, match=f"torch.compile needs a {kind} compiler, and .* is not found"):
        check_compiler(("tower",), torch.device(device))


@pytest.mark.slow  # the compiler itself: a minute and more
def test_compiled_kernels_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    plain, own = wrapped(), wrapped("tower+prefill+decode")
    for num, length in ((1, 6), (3, 9)):
        inputs = prompts(num, length)
        assert own.generate(**inputs, **GREEDY).tolist() == plain.generate(**inputs, **GREEDY).tolist()


def test_planes_are_known_of_the_family() -> None:
    model = tiny_qwen3.build()
    with pytest.raises(ConfigError, match="deeper layers"):
        vzip.CompressedVlm(model, vzip.VisionZip(vzip.TokenBudget(3, 2)), compile="decode")
