"""Figures of the paper, one file a figure: each draws from what was measured and says on what."""
