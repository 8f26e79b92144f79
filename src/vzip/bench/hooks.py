"""Reading what modules return, and what torch calls, during one call, without leaving anything behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


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


class FusedAttention(TorchDispatchMode):
    """While it is entered, notes in ``names`` which of torch's fused attention operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "scaled_dot_product_attention":  # in inference mode it comes whole
            with self:
                return func.decompose(*args, **kwargs)
        if name.startswith("_scaled_dot_product") and not name.endswith("_math"):
            self.names.add(name)
        return func(*args, **kwargs)
