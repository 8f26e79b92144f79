"""Compressed models in vLLM: a plug-in that vLLM loads by its entry point, and serves by ``--hf-overrides``.

``vllm serve CHECKPOINT --hf-overrides '{"architectures": ["VzipLlavaForConditionalGeneration"], "vzip": {...}}'``; the
keys of ``vzip`` are those of ``settings.read_settings``. Nothing here imports vLLM before vLLM itself runs.
"""

from __future__ import annotations

# The architecture of a checkpoint's config.json, and the one that serves it compressed. The names are our own, so that
# a vLLM without the plug-in refuses them, where a mere key of the stock name's would be ignored in silence.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "VzipLlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": "VzipLlavaNextForConditionalGeneration",
}


def register() -> None:
    """Tells vLLM the architectures; called in each of its processes, it leaves their import to vLLM."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"vzip.serving.models:{name}")
