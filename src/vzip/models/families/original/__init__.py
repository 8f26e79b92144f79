"""Checkpoints in their authors' layout and not Hugging Face's: what those of the LLaVA kin share.

``checkpoint`` is what a family's own reader builds on, ``llava`` reads LLaVA's; Mini-Gemini's and Video-LLaVA's are in
their folders.
"""
