"""The benchmark of six images that the demo's tests use."""

from __future__ import annotations

from tests.demo.conftest import small_benchmark

__all__ = ["small_benchmark"]
