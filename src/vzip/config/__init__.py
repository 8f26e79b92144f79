"""From Hydra files to plain arguments: what may be set, what is wrong with it, and what it builds."""
