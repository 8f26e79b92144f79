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
from typing import Any

from vzip.config.build import chat_plan
from vzip.errors import ConfigError

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
    model, compressor, system_prompt = chat_plan([f"model={arguments.model}", *arguments.settings])
    import vzip
    from vzip.demo.page import widgets  # gradio, which may be missing
    from vzip.demo.page.page import Page, examples
    from vzip.demo.page.studio import MIN_TOKENS, Studio
    from vzip.methods import method_files

    studio = Studio(vzip.load_vlm(**model), system_prompt, arguments.max_new_tokens)
    named = {entry.method: name for name, entry in method_files().items() if name in studio.methods}
    budget: Any = getattr(compressor, "budget", None)
    num_tokens = max(MIN_TOKENS, min(studio.max_tokens, getattr(budget, "num_tokens", studio.max_tokens)))
    _until_terminated()
    try:
        widgets.serve(
            studio,
            Page(studio, examples()),
            arguments.model,
            named.get(type(compressor), studio.methods[0]),
            num_tokens,
            arguments.host,
            arguments.port,
            lambda address: print(f"the page: {address} (ctrl-C ends it)", flush=True),
        )
    except KeyboardInterrupt:
        print("\nended; uploads are deleted", flush=True)
    return 0


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
    except OSError as error:
        raise ConfigError(
            f"--host={host} --port={port}: nobody can listen there ({error.strerror or error}). Name another port, or"
            " leave --host out."
        ) from error
    if not ipaddress.ip_address(address[0]).is_loopback:
        _LOG.warning(
            "--host=%s: everyone who reaches this machine can use the page and see its model; there is no password. The"
            " default, 127.0.0.1, is this machine alone.",
            host,
        )
