"""What one ``encode_images``, one prefill and one further token cost beyond the unmodified model: counts, not times.

Operators that run inside Hugging Face's modules are theirs, and change with their versions; all others are ours. What
we add within their modules shows in the difference to a run of the unmodified model on the same inputs. So the counts
hold for every version of transformers that is served. ``python -m tests.models.operators`` writes them anew.

The tests have no GPU. A wait of the host is therefore found by where a value comes from: everything that is given,
weights, pixels and ids, counts as lying on a device, and so does what is computed from it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tests import tiny, tiny_internvl, tiny_mini_gemini, tiny_qwen, tiny_qwen3
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vzip

COUNTS = Path(__file__).with_name("operators.json")
COMPRESSOR = vzip.VisionZip(vzip.TokenBudget(6, 3))
# Operators whose result, or whose shape, the host must wait for; and methods of a tensor that hand its values out.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave")
HANDED_OUT = ("tolist", "numpy", "cpu")
SOURCE, HUGGING_FACE = (str(Path(package.__file__).parent) for package in (vzip, transformers))


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _on_device(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) or getattr(value, "_lies_on_device", False)


def _place() -> str | None:
    """The function of ours that is running, as ``models.splice.plan_splice``; None: Hugging Face's code runs."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(SOURCE):
            return f"{path[len(SOURCE) + 1 : -3].replace('/', '.')}.{frame.f_code.co_qualname}"
        if path.startswith(HUGGING_FACE):
            return None
        frame = frame.f_back
    return None


class _HandedOut(TorchFunctionMode):
    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in HANDED_OUT and _on_device(args[0]) and (place := _place()) is not None:
            self.count.waits[place] += 1
        return func(*args, **(kwargs or {}))


class Count(TorchDispatchMode):
    """While entered, counts what torch runs.

    Attributes:
        ours: operators outside of the model's modules; views, which compute nothing, are left out.
        within: operators inside of them, likewise.
        waits: functions of ours -> how often the host waits there for the device.
        num_bytes: allocated by our operators.
        calls: layers of a vision tower or language model that ran, by their class.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.depth = 0
        self.ours: Counter[str] = Counter()
        self.within: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors(args, kwargs)
        output = func(*args, **(kwargs or {}))
        made, name = _tensors(output), func.overloadpacket.__name__
        is_on_device = any(map(_on_device, given))
        for tensor in made:
            tensor._lies_on_device = is_on_device or getattr(tensor, "_lies_on_device", False)
        if is_on_device and name in WAITS and (place := _place()) is not None:
            self.waits[place] += 1
        before = {tensor.untyped_storage().data_ptr() for tensor in given}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in made}
        new = [size for place, size in storages.items() if place not in before]
        if new or not made or func._schema.is_mutable:
            (self.within if self.depth else self.ours)[name] += 1
            self.num_bytes += 0 if self.depth else sum(new)
        return output

    @contextmanager
    def counting(self) -> Iterator[Count]:
        """Counts within it; the hooks are gone afterwards."""

        def enter(_module: nn.Module, _args: Any) -> None:
            self.depth += 1

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            self.depth -= 1
            if type(module).__name__.endswith(("Layer", "Block")):
                self.calls[type(module).__name__] += 1

        with ExitStack() as stack:
            for module in self.model.modules():  # what runs in a hook of ours runs after `leave` and counts as ours
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, prepend=True).remove)
            stack.enter_context(_HandedOut(self))
            stack.enter_context(self)
            yield self


def _given(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    for tensor in inputs.values():
        tensor._lies_on_device = True  # type: ignore[attr-defined]
    return inputs


@torch.no_grad()
def counted(model: nn.Module, run: Callable[[], Any]) -> Count:
    for tensor in model.buffers():
        tensor._lies_on_device = True  # type: ignore[attr-defined]
    with Count(model).counting() as count:
        run()
    return count


def _beyond(ours: Counter[str], *others: Counter[str]) -> dict[str, int]:
    """How many more there are of each, or below 0 fewer; what is as many is left out."""
    for other in others:
        ours = ours.copy()
        ours.subtract(other)
    return {name: count for name, count in sorted(ours.items()) if count}


def measure(model: Any, inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Any]:
    """All counts of a model: ``encode``, ``prefill`` and ``decode``."""
    vlm = vzip.CompressedVlm(model, COMPRESSOR)
    is_video = "pixel_values_videos" in inputs
    encode = vlm.encode_videos if is_video else vlm.encode_images
    mask = torch.ones_like(ids)
    given = {**inputs, "input_ids": ids, "attention_mask": mask}
    encoded = counted(model, lambda: encode(**_given(inputs)))
    whole = counted(model, lambda: vlm.forward(**_given(given), logits_to_keep=1))
    with torch.no_grad():
        prepared = vlm.prepare(**given)
        stock_inputs = {
            "inputs_embeds": prepared.inputs_embeds,
            "attention_mask": prepared.attention_mask,
            "position_ids": prepared.position_ids,
        }
        stock = counted(model, lambda: model(**_given(stock_inputs), logits_to_keep=1))
    settings = {"do_sample": False, "eos_token_id": None}

    def step(generate: Callable[..., Any]) -> tuple[Count, Count]:
        """With a token more, and without."""
        few, many = (counted(model, lambda num=num: generate(max_new_tokens=num, **settings)) for num in (4, 5))
        return many, few

    ours, before = step(lambda **words: vlm.generate(**_given(given), **words))
    theirs, theirs_before = step(lambda **words: model.generate(**_given(stock_inputs), **words))

    def of_step(name: str) -> dict[str, int]:
        one, less, other, more = (getattr(count, name) for count in (ours, before, theirs, theirs_before))
        return _beyond(one + more, less, other)

    return {
        "encode": {
            "operators": _beyond(encoded.ours),
            "num_operators": encoded.ours.total(),
            "allocated_bytes": encoded.num_bytes,
            "layers": _beyond(encoded.calls),
            "waits": _beyond(encoded.waits),
        },
        "prefill": {
            "operators": _beyond(whole.ours, encoded.ours, stock.ours),
            "within_the_model": _beyond(whole.within, encoded.within, stock.within),
            "waits": _beyond(whole.waits, encoded.waits),
        },
        "decode": {
            name: of_step(at)
            for name, at in (("operators", "ours"), ("within_the_model", "within"), ("waits", "waits"))
        },
    }


def _prompt(family: tiny.Family, num_images: int) -> Tensor:
    return torch.tensor([[1, 5, 6, *[family.token] * num_images, 7, 8]])


def _of(family: tiny.Family, tower: str | None = None) -> Callable[[], dict[str, Any]]:
    kind = next(kind for kind in family.kinds if tower in (None, kind[0]))
    return lambda: measure(family.build(*kind), family.inputs(1), _prompt(family, 1))


def _qwen(tiny_module: Any) -> Callable[[], dict[str, Any]]:
    grids = ("4x8", "6x10")
    ids = torch.tensor([tiny_qwen.prompt(7, grids[0], 8, grids[1], 9)])
    return lambda: measure(tiny_module.build(), tiny_qwen.images(*grids), ids)


_FAMILIES = {family.name.replace("_tiny", ""): family for family in (*tiny.FAMILIES, tiny_mini_gemini.FAMILY)}
MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "llava15_siglip": _of(_FAMILIES["llava15"], "siglip"),
    **{name: _of(family) for name, family in _FAMILIES.items()},
    "internvl": _of(tiny_internvl.FAMILY),
    "qwen2_5_vl": _qwen(tiny_qwen),
    "qwen3_vl": _qwen(tiny_qwen3),
}
"""Name -> what counts it; images of one prompt, or one video."""


def changes(expected: Any, found: Any, where: str = "") -> list[str]:
    """What differs between two such counts, a line for each, as ``encode operators: sort 2 -> 3``."""
    if not isinstance(found, dict):
        return [f"{where} {expected} -> {found}"] if expected != found else []
    names = sorted({*expected, *found})
    return [
        line
        for name in names
        for line in changes(
            expected.get(name, type(found.get(name))()),
            found.get(name, type(expected.get(name))()),
            f"{where} {name}".strip(),
        )
    ]


def main() -> None:
    known = json.loads(COUNTS.read_text()) if COUNTS.exists() else {"why_the_host_waits": {}}
    known["models"] = {name: run() for name, run in MODELS.items()}
    COUNTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
