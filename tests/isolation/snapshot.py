"""All that a model and its classes hold, to see what has changed."""

from __future__ import annotations

import sys

from torch import nn


def state_of(value: object) -> object:
    """A value as something comparable: containers by content, all else by identity."""
    if isinstance(value, dict):
        return {key: state_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [state_of(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Every attribute of every module (parameters, buffers, hooks, config) and of every class they are made from."""
    seen: dict[str, object] = {}
    classes: set[type] = set()
    for name, module in model.named_modules():
        classes.update(type(module).__mro__)
        seen[f"type of {name}"] = id(type(module))
        for key, value in vars(module).items():
            seen[f"{name}.{key}"] = state_of(value)
        if hasattr(module, "config"):
            seen[f"{name}.config"] = str(module.config.to_dict())
    for name, parameter in model.named_parameters():
        seen[f"parameter {name}"] = (id(parameter), parameter.requires_grad, parameter._version)
    for cls in classes:
        for key, value in vars(cls).items():
            if key not in ("__dict__", "__weakref__", "_abc_impl"):
                seen[f"class {cls.__qualname__}.{key}"] = id(value)
    for module_name in ("transformers.models.clip.modeling_clip", "transformers.models.llava.modeling_llava"):
        for key, value in vars(sys.modules[module_name]).items():
            seen[f"{module_name}.{key}"] = id(value)
    return seen


def changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
