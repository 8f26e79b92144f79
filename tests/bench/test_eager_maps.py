"""The published way is rendered right, agrees with ours, and leaves the model alone."""

from __future__ import annotations

import pytest
import torch
from tests import tiny

from vzip.bench import eager_maps
from vzip.bench.eager_maps import EagerMaps, NotEquivalentError, check_agreement
from vzip.compressors import TokenBudget, VisionZip
from vzip.errors import UnsupportedModelError
from vzip.models.towers.structure import find_tower
from vzip.models.towers.tap import run_tower

COMPRESSOR = VisionZip(TokenBudget(12, 4))


def tower_of(kind: str = "clip") -> torch.nn.Module:
    return tiny.llava(kind).model.vision_tower  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("select_layer", [-2, -1, 2])
def test_same_output_as_our_tower(kind: str, select_layer: int) -> None:
    tower = tower_of(kind)
    with torch.inference_mode():
        ours = run_tower(find_tower(tower), tiny.pixels(3), select_layer, COMPRESSOR.reads())
        theirs = EagerMaps(tower, select_layer).encode(tiny.pixels(3))
        for name in ("hidden", "attention", "keys"):
            left, right = getattr(ours, name), getattr(theirs, name)
            torch.testing.assert_close(left, right, rtol=0.0, atol=1e-4 * float(right.abs().max()), msg=name)
        assert torch.equal(COMPRESSOR(ours).source_index, COMPRESSOR(theirs).source_index)


def test_all_maps_and_hidden_states_are_really_made() -> None:
    """Otherwise it would not be what it is compared as."""
    eager = EagerMaps(tower_of(), -2)
    seen: list[object] = []
    eager.twin.register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.inference_mode():
        eager.encode(tiny.pixels(2))
    (output,) = seen
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 65, 65)] * 4  # type: ignore[attr-defined]
    assert len(output.hidden_states) == 5  # type: ignore[attr-defined]
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 65))  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_twin_shares_weights_and_the_original_is_untouched(kind: str) -> None:
    tower = tower_of(kind)
    before = {name: (p.data_ptr(), p.clone()) for name, p in tower.named_parameters()}
    hooks = {name: len(m._forward_hooks) for name, m in tower.named_modules()}
    eager = EagerMaps(tower, -2)
    with torch.inference_mode():
        eager.encode(tiny.pixels(1))
    for name, parameter in eager.twin.named_parameters():
        assert parameter.data_ptr() == before[name][0], name
    for name, parameter in tower.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1]), name
    assert {name: len(m._forward_hooks) for name, m in tower.named_modules()} == hooks
    assert tower.config._attn_implementation == "sdpa"
    assert eager.twin.config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agreement_is_checked_in_float32(dtype: torch.dtype) -> None:
    tower = tower_of().to(dtype)
    agreement = check_agreement(tower, -2, COMPRESSOR, tiny.pixels(3).to(dtype))
    assert agreement.max_token_difference < 1e-4 and agreement.max_attention_difference < 1e-5
    assert next(tower.parameters()).dtype == dtype


@pytest.mark.parametrize("field", ["attention", "hidden", "keys"])
def test_a_wrong_rendering_is_caught(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    right = EagerMaps.encode

    def wrong(self: EagerMaps, pixel_values: torch.Tensor) -> object:
        vision = right(self, pixel_values)
        vars(vision)[field] = vars(vision)[field].roll(1, dims=1)
        return vision

    monkeypatch.setattr(EagerMaps, "encode", wrong)
    with pytest.raises(NotEquivalentError, match="differ in"):
        check_agreement(tower_of(), -2, COMPRESSOR, tiny.pixels(2))


def test_a_wrong_selection_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager_maps, "_same_selection", lambda _ours, _theirs: False)
    with pytest.raises(NotEquivalentError, match="selected different tokens on all 3 images"):
        check_agreement(tower_of(), -2, COMPRESSOR, tiny.pixels(5))


def test_layer_before_any_attention() -> None:
    with pytest.raises(UnsupportedModelError, match="vision_feature_layer=0"):
        EagerMaps(tower_of(), 0)
