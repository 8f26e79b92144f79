"""Pure tensor functions: scores, selection, merge. They know no model and import torch alone."""
