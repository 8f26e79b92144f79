"""Whom a judge's questions go to, and the key."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from vzip.errors import ConfigError

KEY_VARIABLE = "OPENAI_API_KEY"
OFFICIAL_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class JudgeSettings:
    """Whom to ask, and how; all of it decides replies, and is recorded.

    Attributes:
        model: the name that the endpoint knows it by.
        base_url: the endpoint's address up to ``/chat/completions``.
        temperature: 0 for the most probable reply.
        max_tokens: of a reply.
    """

    model: str
    base_url: str = OFFICIAL_URL
    temperature: float = 0.0
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", self.base_url):
            raise ConfigError(  # without the value, which may hold a password
                "--base-url: must be an address such as https://host/v1, without user name, password or question mark."
                f" A key belongs into the environment variable {KEY_VARIABLE}."
            )
        if not self.model:
            raise ConfigError("--model: must be the name of a model.")
        if not self.temperature >= 0:
            raise ConfigError(f"--temperature {self.temperature}: must be 0 or more.")


def read_key(settings: JudgeSettings) -> str | None:
    """The key from the environment; None for an endpoint of one's own that needs none.

    Raises:
        ConfigError: OpenAI's own endpoint, and no key; or settings that hold the key.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key and settings.base_url == OFFICIAL_URL:
        raise ConfigError(
            f"{settings.base_url} wants a key: set the environment variable {KEY_VARIABLE}, or name an endpoint of your"
            " own with --base-url."
        )
    if not key.isascii() or any(character.isspace() for character in key):
        raise ConfigError(f"{KEY_VARIABLE}: holds characters that no key has. Set it again.")
    if key and (key in settings.base_url or key in settings.model):
        raise ConfigError(
            f"--base-url, --model: must not hold the key, since they are recorded; it is taken from {KEY_VARIABLE}."
        )
    return key or None
