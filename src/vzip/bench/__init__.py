"""Measures what visual tokens cost: time per stage, memory, key-value cache and floating point operations."""
