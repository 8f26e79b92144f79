"""Vision towers, language model families and the wrapper around them; transformers' models are imported here."""

from .environment import refuse_broken_packages

refuse_broken_packages(["torchvision"])
