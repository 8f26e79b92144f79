"""The wrapper of ``train.py`` and ``eval.py``: user errors without a traceback, exit code 2."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vzip import log, starting
from vzip.cli.listing import program_help
from vzip.config.options import config_dir, with_own_folder, with_own_folder_of_job
from vzip.config.overrides import arrange, check_overrides
from vzip.config.several_budgets import spelled_out
from vzip.errors import VzipError
from vzip.installed import is_missing, missing_package, optional_packages
from vzip.log import USER_ERROR
from vzip.paths import naming_impossible_paths
from vzip.sweep import sweep

_FULL = "HYDRA_FULL_ERROR"


def entry_point(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Makes a function of a composed configuration the main of a script.

    Args:
        config_name: the primary in ``configs``, without its ending.

    What the function returns is the objective of an optimising sweep (``hydra/sweeper=optuna``). A sweep ends with its
    summary, also where jobs failed; then the exit code is not 0.

    What the user caused (``VzipError``, Hydra's and OmegaConf's errors) is printed as one message, exit code 2;
    an interruption (ctrl-C) is one line, exit code 130; everything else keeps its traceback.
    ``HYDRA_FULL_ERROR=1`` shows every traceback.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(function)
        def main() -> None:
            log.setup()
            wants_traceback = os.environ.get(_FULL) == "1"

            def job(cfg: DictConfig) -> Any:
                log.setup()  # a sweep's launcher may run it in another process
                try:
                    sweep.place_job()
                    with (
                        with_own_folder_of_job(HydraConfig.get()),
                        _as_the_user_set_it(wants_traceback),
                        optional_packages(f"`{config_name}`", config_name),
                        naming_impossible_paths(),
                    ):
                        return function(cfg)
                except VzipError as error:
                    # A sweep goes on with its other jobs, and Hydra names the overrides of the one that failed.
                    if wants_traceback or HydraConfig.get().mode is RunMode.MULTIRUN:
                        raise
                    fail(error)

            def run(words: list[str]) -> None:
                if {"-h", "--help"} & set(words):
                    return print(program_help(function.__globals__["__doc__"]))
                sys.argv[1:] = arrange(spelled_out(words, config_name))
                directory = config_dir()
                check_overrides(sys.argv[1:], directory, config_name)
                # Hydra must hand its exceptions on instead of printing them: this is its own switch for that.
                os.environ[_FULL] = "1"
                num_failed = 0
                with sweep.leaving_nothing_if_dry(sys.argv):
                    try:
                        hydra.main(version_base="1.3", config_path=str(directory), config_name=config_name)(job)()
                    except KeyboardInterrupt as error:
                        raise sweep.interruption(error) from None
                    finally:
                        num_failed = sweep.finish()
                if num_failed:  # a sweeper that lives with failures
                    sys.exit(USER_ERROR)
                return None

            try:
                starting.over()
                with with_own_folder(sys.argv[1:]) as words:
                    run(words)
                sys.stdout.flush()  # here, where a reader that has gone is no traceback
            except (VzipError, HydraException, OmegaConfBaseException) as error:
                if wants_traceback:
                    raise
                fail(_missing_plugin(error) or error)
            except KeyboardInterrupt as error:
                if wants_traceback:
                    raise
                sys.exit(log.tell_interruption(error))
            except OSError as error:
                sys.exit(log.output_failed(error))
            finally:
                if not wants_traceback:
                    os.environ.pop(_FULL, None)

        return main

    return decorate


@contextlib.contextmanager
def _as_the_user_set_it(wants_traceback: bool) -> Iterator[None]:
    """Takes Hydra's switch back while a job runs, so that the processes it starts do not inherit it."""
    if wants_traceback:
        yield
        return
    os.environ.pop(_FULL, None)
    try:
        yield
    finally:
        os.environ[_FULL] = "1"


def _missing_plugin(error: Exception) -> VzipError | None:
    """What to install, where Hydra does not know a launcher or sweeper because its plugin is missing."""
    option = str(getattr(error, "missing_cfg_file", None))
    found = re.fullmatch("hydra/(launcher|sweeper)/([a-z]+).*", option)
    plugin = f"hydra_{found[2]}_{found[1]}" if found else ""
    if not is_missing(plugin.replace("_", "-")):
        return None
    return missing_package("=".join(option.rsplit("/", 1)), f"hydra_plugins.{plugin}")


def fail(error: Exception) -> NoReturn:
    """Prints a user's error, without Hydra's lines about where it searched, and ends with USER_ERROR."""
    message = str(error).split("\nConfig search path:")[0].strip()
    print(f"{type(error).__name__}: {log.nearest_last(message)}", file=sys.stderr)
    sys.exit(USER_ERROR)
