"""A page where people try compression: an image or a video, a question, vanilla and compressed answers side by side.

python -m vzip demo serve                               the built-in model at http://127.0.0.1:7860, without a network
python -m vzip demo serve --model llava15_7b model.device_map=auto
python -m vzip demo serve --model qwen2_5_vl_7b compressor=divprune budget=128tok --port 8000

Ctrl-C ends it and deletes what was uploaded. It needs gradio: `make page` installs it beside the rest and starts.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import signal
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vzip.config.build import chat_plan, refuse_unused
from vzip.errors import ConfigError

if TYPE_CHECKING:
    from vzip.compressors.base import Compressor

_LOG = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="as for eval.py; compressor and budget are where it starts"
    )
    parser.add_argument("--model", default="tiny", help="a name in configs/model (default: tiny)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="most tokens of an answer (default: 64)")


def main(arguments: argparse.Namespace) -> int:
    """Serves until it is interrupted; everything that can be wrong is checked before the model is loaded."""
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={arguments.max_new_tokens}: must be 1 or more.")
    _check_address(arguments.host, arguments.port)
    refuse_unused(arguments.settings)
    model, compressor, system_prompt = chat_plan([f"model={arguments.model}", *arguments.settings])
    method = _method(arguments.settings, compressor)
    import vzip
    from vzip.demo.page import widgets  # gradio, which may be missing
    from vzip.demo.page.page import Page, examples
    from vzip.demo.page.studio import MIN_TOKENS, Studio

    studio = Studio(vzip.load_vlm(**model), system_prompt, arguments.max_new_tokens)
    if method not in studio.methods:
        usual = "visionzip" if "visionzip" in studio.methods else studio.methods[0]
        _LOG.warning(
            "compressor=%s: not to be had with model=%s here; it starts with %s.", method, arguments.model, usual
        )
        method = usual
    num_tokens = max(MIN_TOKENS, min(studio.max_tokens, compressor.num_tokens(studio.shape)))
    _until_terminated()
    try:
        widgets.serve(
            studio,
            Page(studio, examples()),
            arguments.model,
            method,
            num_tokens,
            arguments.host,
            arguments.port,
            lambda address: print(f"the page: {address} (ctrl-C ends it)", flush=True),
        )
    except KeyboardInterrupt:
        print("\nended; uploads are deleted", flush=True)
    return 0


def _method(words: Sequence[str], compressor: Compressor) -> str:
    """The name of the method that the page starts with.

    Raises:
        ConfigError: none, or one with settings of its own, which the page's controls do not have.
    """
    from vzip.methods import method_files

    if own := [word for word in words if word.startswith("compressor.")]:
        raise ConfigError(f"{' '.join(own)}: the page has methods as their files set them; leave it out.")
    given = [word.partition("=")[2] for word in words if word.startswith("compressor=")]
    name = given[-1] if given else next(n for n, file in method_files().items() if file.method is type(compressor))
    if name == "none":
        raise ConfigError(
            "compressor=none: the page has the model without compression on its left side always. Name the method"
            " that the other side starts with, or leave it out."
        )
    return name


def _until_terminated() -> None:
    """A page that is told to end cleans up as one that is interrupted."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)


def _check_address(host: str, port: int) -> None:
    """Raises ConfigError where nobody can listen; warns where others can reach it."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port={port}: must be 1 to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except (OSError, UnicodeError) as error:  # the latter of a name that none can have, as one of 70 letters
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--host={host} --port={port}: nobody can listen there ({why}). Name another port, or leave --host out."
        ) from error
    if not ipaddress.ip_address(address[0]).is_loopback:
        _LOG.warning(
            "--host=%s: everyone who reaches this machine can use the page and see its model; there is no password. The"
            " default, 127.0.0.1, is this machine alone.",
            host,
        )
