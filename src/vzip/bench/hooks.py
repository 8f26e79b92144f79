"""Reading what modules return, and what torch calls, during one call, without leaving anything behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vzip.bench.timing import Stopwatch


@contextmanager
def recorded_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Stores the output of each module under its name while the context lasts; the hooks are gone afterwards."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in modules.items():

            def keep(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                outputs[name] = output[0] if isinstance(output, tuple) else output

            stack.callback(module.register_forward_hook(keep).remove)
        yield outputs


Shape = tuple[int, int, int]
"""Of a matrix product ``[m, k] @ [k, n]``: m, k, n."""


class Seen(TorchDispatchMode):
    """While it is entered, notes what torch runs: which of its fused attention operators, which products of weights.

    Args:
        watch: whose ``running`` says which stage a product belongs to.

    Attributes:
        attention: names of the fused attention operators.
        products: stage -> how often a product of each shape ran; a convolution counts as the product it is.
    """

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self.watch = watch
        self.attention: set[str] = set()
        self.products: dict[str, Counter[Shape]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "scaled_dot_product_attention":  # in inference mode it comes whole
            with self:
                return func.decompose(*args, **kwargs)
        if name.startswith("_scaled_dot_product") and not name.endswith("_math"):
            self.attention.add(name)
        output = func(*args, **kwargs)
        if self.watch.running is not None and (weight_at := _WEIGHTS.get(name)) is not None:
            weight: Tensor = args[weight_at]
            num_out = weight.shape[1 if name in ("mm", "addmm") else 0]
            shape = (output.numel() // num_out, weight.numel() // num_out, num_out)
            self.products.setdefault(self.watch.running, Counter())[shape] += 1
        return output


# Operators that multiply rows by a weight -> which argument that is.
_WEIGHTS = {"linear": 1, "mm": 1, "addmm": 2, "conv2d": 1, "convolution": 1}
