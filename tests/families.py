"""Every model family in small: the one list that the tests of parity, devices and quantization run over."""

from __future__ import annotations

from tests import tiny, tiny_internvl, tiny_mini_gemini

FAMILIES = (*tiny.FAMILIES, tiny_mini_gemini.FAMILY, tiny_internvl.FAMILY)
