"""Reading what modules return during one call, without leaving anything on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


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
