"""How much memory a training or an inference needs at its worst moment: estimated without weights, or measured."""
