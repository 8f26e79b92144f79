"""Every compressor against the same promises; VisionZip against published numbers and plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tests import methods, reference
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vzip
from vzip.compressors import CompressedTokens, Compressor, Signal, VisionOutput, VisionShape
from vzip.errors import ConfigError

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
COMPRESSORS = [
    *(methods.build(name, BUDGET) for name in methods.METHODS),
    vzip.VisionZip(BUDGET, merge_rule="mean"),
    vzip.VisionZip(vzip.TokenBudget(1, 5)),
    vzip.VisionZip(vzip.TokenBudget(4, 0)),
    vzip.RandomTokens(BUDGET, seed=3),
    vzip.DivPrune(BUDGET, centered=True),
    vzip.CDPruner(BUDGET, relevance="positive"),
    vzip.MMTok(BUDGET, alpha=0.1, stop_words=False),
]
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
with_and_without_cls = pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "no_cls"])


def vision_output(has_cls=True, num_crops=4, grid=(5, 8), dtype=torch.float32, seed=0, device="cpu"):
    num_patches = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)
    length = num_patches + has_cls
    return VisionOutput(
        hidden=torch.randn(num_crops, length, 6, generator=generator).to(device, dtype),
        has_cls=has_cls,
        grid=grid,
        attention=torch.rand(num_crops, num_patches, generator=generator).to(device),
        keys=torch.randn(num_crops, length, 4, generator=generator).to(device),
        signals={
            Signal("attention", 6): torch.rand(num_crops, num_patches, generator=generator).to(device),
            Signal("undivided_attention", -1): (
                torch.rand(num_crops, num_patches, generator=generator).to(device) / num_patches
            ),
            Signal("present"): torch.ones(num_crops, num_patches, device=device).index_fill(
                1, torch.arange(9, num_patches, device=device), 0.0
            ),
            Signal("undivided_keys", -1): torch.randn(num_crops, length, 4, generator=generator).to(device),
            Signal("text"): questions(num_crops, generator).to(device),
            Signal("aligned", -2): torch.randn(num_crops, length, 6, generator=generator).to(device),
        },
        project=lambda rows: rows * 0.5,
    )


def questions(num_crops, generator):
    """Of one to three tokens, in turn."""
    rows = torch.randn(num_crops, 3, 6, generator=generator)
    for crop in range(num_crops):
        rows[crop, crop % 3 + 1 :] = 0
    return rows


def crop_of(vision: VisionOutput, number: int) -> VisionOutput:
    part = slice(number, number + 1)
    return replace(
        vision,
        hidden=vision.hidden[part],
        attention=vision.attention[part],
        keys=vision.keys[part],
        signals={signal: value[part] for signal, value in vision.signals.items()},
    )


def golden_names() -> list[str]:
    return [
        "49_20+20",
        "100_13+9",
        *(f"576_{b}" for b in ("2+1", "14+3", "28+4", "54+10", "100+7", "108+20", "162+30")),
    ]


@pytest.mark.parametrize("name", golden_names())
def test_visionzip_equals_the_published_code(golden, name):
    numbers = load_file(golden / f"compress_{name}.safetensors")
    patches, budget = name.split("_")
    num_dominant, num_contextual = map(int, budget.split("+"))
    vision = VisionOutput(
        hidden=numbers["hidden"],
        has_cls=True,
        grid=(1, int(patches)),
        attention=numbers["cls_attention"].sum(dim=1),
        keys=numbers["key_mean"],
    )
    result = vzip.VisionZip(vzip.TokenBudget(num_dominant, num_contextual))(vision)
    torch.testing.assert_close(result.tokens, numbers["tokens"], rtol=0, atol=1e-5)
    assert torch.equal(result.source_index, numbers["dominant_indices"].to(torch.int64))


def test_golden_names_are_all_the_files(golden):
    assert sorted(f"compress_{name}.safetensors" for name in golden_names()) == sorted(
        path.name for path in golden.glob("compress_*")
    )


@with_and_without_cls
@pytest.mark.parametrize("rule", ["sum", "mean"])
@pytest.mark.parametrize("budget", [(1, 1), (6, 3), (3, 9), (10, 0), (2, 11), (30, 10), (39, 1)])
def test_visionzip_equals_plain_loops(has_cls, rule, budget):
    vision = vision_output(has_cls, dtype=torch.float64, seed=sum(budget))
    result = vzip.VisionZip(vzip.TokenBudget(*budget), rule)(vision)
    for crop in range(4):
        tokens, kept, merged = reference.visionzip(
            vision.hidden[crop].tolist(),
            vision.attention[crop].tolist(),
            vision.keys[crop].tolist(),
            *budget,
            has_cls,
            rule,
        )
        assert result.source_index[crop].tolist() == kept
        assert result.merge_index[crop].tolist() == merged
        expected = torch.tensor(tokens, dtype=torch.float64)
        torch.testing.assert_close(result.tokens[crop], expected, rtol=0, atol=1e-12)


@every_compressor
@with_and_without_cls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_count_type_and_indices(compressor, has_cls, dtype):
    vision = vision_output(has_cls, dtype=dtype)
    result = compressor(vision)
    budget = getattr(compressor, "budget", None)
    assert result.num_tokens == (40 if budget is None else budget.num_tokens) == compressor.num_tokens(vision.shape)
    assert result.tokens.dtype == dtype and torch.isfinite(result.tokens).all()
    num_kept = result.source_index.shape[1]
    weights = compressor.select(vision).weights  # where units join several tokens, kept ones are no rows any more
    for crop in range(4):
        kept = result.source_index[crop].tolist()
        assert kept == sorted(set(kept))
        merged_into = set(result.merge_index[crop].tolist()) - {-1}
        assert all(result.merge_index[crop, row] == -1 for row in kept)
        if num_kept < result.num_tokens:
            assert merged_into == set(
                range(result.num_tokens - num_kept)
            )  # each contextual token has at least its target
            merged_into = set()
        rows = vision.hidden if compressor.space == "tower" else vision.read(Signal("projected"))
        for number, row in enumerate(kept):
            if weights is not None:
                assert weights[crop, number, row] == 1
            elif number not in merged_into:
                assert torch.equal(result.tokens[crop, number], rows[crop, row])


@every_compressor
@with_and_without_cls
def test_a_batch_equals_one_by_one(compressor, has_cls):
    vision = vision_output(has_cls)
    together = compressor(vision)
    for number in range(4):
        alone = compressor(crop_of(vision, number))
        torch.testing.assert_close(together.tokens[number : number + 1], alone.tokens, rtol=0, atol=1e-6)
        assert torch.equal(together.source_index[number : number + 1], alone.source_index)
        assert torch.equal(together.merge_index[number : number + 1], alone.merge_index)


@every_compressor
@with_and_without_cls
def test_no_host_synchronisation(compressor, has_cls):
    """On fake tensors every read of a value on the host raises: .item(), nonzero, boolean masks."""
    with FakeTensorMode() as mode:
        vision = vision_output(has_cls, device="cpu")
        with pytest.raises(DataDependentOutputException):
            _ = vision.attention.sum().item()  # the guard bites
    with mode:
        result = compressor(vision)
    assert result.tokens.shape[1] == compressor.num_tokens(vision.shape)


class CountCalls(TorchDispatchMode):
    """Counts the kernels a block runs."""

    def __init__(self):
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


@every_compressor
def test_no_loop_over_crops(compressor):
    counts = []
    for num_crops in (1, 9):
        vision = vision_output(num_crops=num_crops)
        with CountCalls() as counter:
            compressor(vision)
        counts.append(counter.num_calls)
    assert counts[0] == counts[1]


@every_compressor
def test_input_is_left_alone(compressor):
    vision = vision_output()
    before = [tensor.clone() for tensor in (vision.hidden, vision.attention, vision.keys)]
    compressor(vision)
    for old, new in zip(before, (vision.hidden, vision.attention, vision.keys), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    "compressor", [vzip.VisionZip(BUDGET), vzip.VisionZip(BUDGET, "mean"), vzip.ContextualOnly(BUDGET)]
)
def test_gradients_through_kept_and_merged_tokens(compressor):
    vision = vision_output(num_crops=2, dtype=torch.float64)
    hidden = vision.hidden.clone().requires_grad_()

    def tokens(hidden):
        return compressor(VisionOutput(hidden, True, vision.grid, vision.attention, vision.keys)).tokens

    assert torch.autograd.gradcheck(tokens, (hidden,))
    (gradient,) = torch.autograd.grad(tokens(hidden).sum(), hidden)
    first_patch = 0 if isinstance(compressor, vzip.VisionZip) else 1
    assert (gradient[:, first_patch:] != 0).all()  # every row that is kept or merged is reached


@with_and_without_cls
def test_identity_is_what_the_stock_model_uses(has_cls):
    vision = vision_output(has_cls)
    result = vzip.Identity()(vision)
    assert torch.equal(result.tokens, vision.read(Signal("projected"))[:, int(has_cls) :])
    for offset in (0, 1):
        given = VisionOutput(vision.hidden, has_cls, vision.grid, stock_offset=offset)
        assert torch.equal(vzip.Identity()(given).tokens, vision.hidden[:, offset:])


def test_controls_keep_patches_and_never_cls():
    vision = vision_output(True)
    for control in (vzip.RandomTokens(BUDGET), vzip.UniformTokens(BUDGET)):
        rows = control(vision).source_index
        assert (rows >= 1).all() and (rows == rows[0]).all()
    seeds = {tuple(vzip.RandomTokens(BUDGET, seed)(vision).source_index[0].tolist()) for seed in range(20)}
    assert len(seeds) == 20


def test_dominant_only_is_visionzip_without_the_merge():
    vision = vision_output(True)
    ours = vzip.DominantOnly(BUDGET)(vision)
    assert torch.equal(ours.tokens, vzip.VisionZip(vzip.TokenBudget(9, 0))(vision).tokens)


@pytest.mark.parametrize("counts", [(-1, 5), (5, -1), (0, 0), (5.0, 1), (0.5, 1), ("54", 10), (True, 1), (5, None)])
def test_impossible_budgets_are_refused(counts):
    with pytest.raises(ConfigError, match=r"budget\.num_(dominant|contextual)="):
        vzip.TokenBudget(*counts)


def test_fractions_are_counts_of_the_crops_own_patches():
    budget = vzip.FractionBudget(0.65, 0.05)
    forty, five = (VisionShape("image", 1, (n, 1), False, n) for n in (40, 5))
    assert [budget.of(shape) for shape in (forty, five)] == [vzip.TokenBudget(26, 2), vzip.TokenBudget(3, 1)]
    assert vzip.FractionBudget(0.01, 0).of(forty) == vzip.TokenBudget(1, 0)
    for has_cls in (True, False):
        vision = vision_output(has_cls)
        ours, counted = vzip.VisionZip(budget)(vision), vzip.VisionZip(vzip.TokenBudget(26, 2))(vision)
        assert torch.equal(ours.tokens, counted.tokens) and torch.equal(ours.merge_index, counted.merge_index)
        assert vzip.FasterVLM(budget)(vision).num_tokens == vzip.DivPrune(budget)(vision).num_tokens == 28
    for wrong in ((-0.1, 0.5), (0.5, 1.5), (0, 0), (0.7, 0.4), (1.0, 1e-20), (1, 0.01), (True, 0), ("0.5", 0)):
        with pytest.raises(ConfigError, match=r"budget\.(dominant|contextual)="):
            vzip.FractionBudget(*wrong)


@pytest.mark.parametrize(
    "kind", [vzip.VisionZip, vzip.RandomTokens, vzip.UniformTokens, vzip.DominantOnly, vzip.ContextualOnly]
)
def test_a_budget_larger_than_the_tower_is_refused(kind):
    with pytest.raises(ConfigError, match=r"= 60 visual tokens per crop.*has 4[01] .*budget\.num_dominant"):
        kind(vzip.TokenBudget(50, 10))(vision_output(True))


def test_the_largest_budget_works_and_cls_must_be_kept():
    vision = vision_output(True)
    assert vzip.VisionZip(vzip.TokenBudget(30, 11))(vision).num_tokens == 41
    with pytest.raises(ConfigError, match="41 to choose from"):
        vzip.VisionZip(vzip.TokenBudget(30, 12))(vision)
    with pytest.raises(ConfigError, match=r"budget\.num_dominant=0"):
        vzip.VisionZip(vzip.TokenBudget(0, 5))(vision)
    assert vzip.VisionZip(vzip.TokenBudget(0, 5))(vision_output(False)).num_tokens == 5


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"merge_rule='summ'.*did you mean 'sum'"):
        vzip.VisionZip(BUDGET, merge_rule="summ")
    for seed in (-1, 0.5, True):
        with pytest.raises(ConfigError, match=r"compressor\.seed"):
            vzip.RandomTokens(BUDGET, seed)


class _Wrong(Compressor):
    """Promises three tokens."""

    def __init__(self, tokens, rows=3):
        self.tokens, self.rows = tokens, rows

    def num_tokens(self, shape):
        return 3

    def select(self, vision):
        raise AssertionError("compress does it all here")

    def compress(self, vision):
        index = torch.full((4, 41), -1)
        return CompressedTokens(self.tokens, torch.zeros(4, self.rows, dtype=torch.int64), index)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(4, 2, 6), "promised"),
        (torch.zeros(3, 3, 6), "promised"),
        (torch.zeros(4, 3, 6, dtype=torch.float64), "float64"),
        (torch.zeros(4, 3, 6, device="meta"), "meta"),
    ],
)
def test_the_base_class_holds_methods_to_their_promise(tokens, message):
    with pytest.raises(ValueError, match=message):
        _Wrong(tokens)(vision_output(True))
    assert _Wrong(torch.zeros(4, 3, 6))(vision_output(True)).num_tokens == 3


def test_unknown_requirement_and_missing_input_are_named():
    with pytest.raises(ConfigError, match=r"signal 'attentions'.*did you mean 'attention'"):
        Signal("attentions")
    with pytest.raises(ConfigError, match=r"layer 1\.5 of signal keys: must be a whole number"):
        Signal("keys", 1.5)
    bare = VisionOutput(torch.zeros(1, 41, 6), True, (5, 8))
    with pytest.raises(ValueError, match="was not recorded: name it in the compressor's `reads`"):
        vzip.VisionZip(BUDGET)(bare)
    with pytest.raises(TypeError, match="scope='image' needs space='projected'"):
        type("Bad", (vzip.Compressor,), {"scope": "image"})


def test_autocast_does_not_change_which_tokens_stay():
    """A training runs under autocast: its float32 scores would be bfloat16 ones, and other patches be kept."""
    generator = torch.Generator().manual_seed(0)
    vision = vision_output(grid=(20, 20), dtype=torch.bfloat16)
    keys = torch.randn(4, 401, 64, generator=generator)
    vision = VisionOutput(vision.hidden, has_cls=True, grid=(20, 20), attention=vision.attention, keys=keys)
    compressor = vzip.VisionZip(vzip.TokenBudget(20, 10))
    plain = compressor(vision)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = compressor(vision)
    assert torch.equal(plain.merge_index, mixed.merge_index) and torch.equal(plain.tokens, mixed.tokens)


def test_least_attended_is_the_other_end_of_the_ranking() -> None:
    hidden, attention = torch.zeros(1, 7, 2), torch.tensor([[0.3, 0.1, 0.5, 0.05, 0.2, 0.4]])
    vision = vzip.VisionOutput(hidden, True, (2, 3), attention)
    kept = vzip.LeastAttended(vzip.TokenBudget(4, 0))(vision)
    assert kept.source_index.tolist() == [[1, 2, 4, 5]], "CLS and the two that it attends to most are gone"
