"""Visual tokens as files, and as what a server takes in place of an image.

vLLM takes visual tokens that were made elsewhere where it was started with ``--enable-mm-embeds``: for trusted users
only, since tokens of a wrong shape may crash its engine. So methods run that its vision tower cannot: text-aware ones,
those that act inside the tower, other families.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vzip.errors import ManifestError

NAME = "image_embeds"
_ABOUT = "vzip"


def to_bytes(tokens: Tensor, about: Mapping[str, Any]) -> bytes:
    """A safetensors file of one image's (or video's) visual tokens.

    Args:
        tokens: ``[num_visual_tokens, d_text]``, as ``CompressedVlm.encode_images`` returns them.
        about: how they were made; kept in the file's header.
    """
    plain = tokens.detach().cpu().contiguous()
    return save({NAME: plain}, metadata={_ABOUT: json.dumps(dict(about))})


def read(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """The tokens ``[num_visual_tokens, d_text]`` of a file, and how they were made.

    Raises:
        ManifestError: the file is damaged, or none that ``to_bytes`` made.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            tokens = opened.get_tensor(NAME)
            about = json.loads((opened.metadata() or {})[_ABOUT])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ManifestError(
            f"{path}: holds no visual tokens ({type(error).__name__}: {error}). It must be a file that `python -m vzip"
            " embed` wrote; make it again."
        ) from error
    return tokens, about


def content_part(tokens: Tensor) -> dict[str, str]:
    """The part of a chat message's ``content`` that stands in place of an image, as vLLM's server reads it.

    Args:
        tokens: ``[num_visual_tokens, d_text]``.
    """
    buffer = io.BytesIO()
    torch.save(tokens.detach().cpu().contiguous().clone(), buffer)  # of a view the whole storage would be sent
    return {"type": NAME, NAME: base64.b64encode(buffer.getvalue()).decode("ascii")}
