"""Starting the processes of a run: one command on one device or on many."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from vzip.errors import ConfigError, VzipError

from .settings import LaunchSettings

_PORT = "29511"
_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LaunchError(VzipError, RuntimeError):
    """Processes that were started have failed."""


def launch_command(
    launch: LaunchSettings, script: Path, words: Sequence[str], environment: Mapping[str, str] | None = None
) -> list[str] | None:
    """The command that starts this machine's processes; None where this process is the one that trains.

    Args:
        launch: the ``launcher`` group.
        script, words: what each process runs.
        environment: the process's own by default.

    Raises:
        ConfigError: several machines without SLURM to say which.
    """
    environment = os.environ if environment is None else environment
    if "RANK" in environment or (launch.num_processes == 1 and launch.num_machines == 1):
        return None
    command = [sys.executable, "-m", "vzip.train.torchrun", f"--nproc_per_node={launch.num_processes}"]
    if launch.num_machines == 1:
        command += ["--standalone"]
    else:
        command += _machines(launch, environment)
    return [*command, str(script), *words]


def num_processes_in_all(launch: LaunchSettings, environment: Mapping[str, str] | None = None) -> int:
    """Over all machines, as torchrun or SLURM say it in the environment."""
    environment = os.environ if environment is None else environment
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    return launch.num_processes * (launch.num_machines or int(environment.get("SLURM_NNODES", "1")))


def run_command(command: Sequence[str]) -> None:
    """Prints the command and runs it to its end; what ends this process (ctrl-C) is handed on to those started.

    Raises:
        LaunchError: it ended with another code than 0.
        KeyboardInterrupt: with an empty text, once the processes have said what is kept.
    """
    print(f"starting: {shlex.join(command)}", file=sys.stderr, flush=True)
    # In a session of their own, so that a terminal's ctrl-C reaches them through this process, and once.
    process = subprocess.Popen(list(command), start_new_session=True)
    was_told: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        if not was_told:
            was_told.append(number)
            process.send_signal(number)

    earlier = {number: signal.signal(number, hand_on) for number in _HANDED_ON} if _in_main_thread() else {}
    try:
        code = process.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    if signal.SIGINT in was_told:
        raise KeyboardInterrupt("")
    if code:
        raise LaunchError(f"the processes ended with code {code}; the first of their messages above says why.")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # elsewhere signals cannot be handled


def _machines(launch: LaunchSettings, environment: Mapping[str, str]) -> list[str]:
    """torchrun's words for one of several machines, as SLURM numbers them."""
    missing = [name for name in ("SLURM_NNODES", "SLURM_NODEID", "SLURM_JOB_NODELIST") if name not in environment]
    if missing:
        raise ConfigError(
            f"launcher.num_machines={launch.num_machines}: {', '.join(missing)} not set, so this is not a SLURM step."
            " Start it with srun once on each machine (see configs/launcher/slurm_multinode.yaml), or set"
            " launcher.num_machines=1."
        )
    count = int(environment["SLURM_NNODES"])
    if launch.num_machines not in (None, count):
        raise ConfigError(
            f"launcher.num_machines={launch.num_machines}: SLURM gave {count} machines. Set it to {count}, or null."
        )
    first = environment.get("MASTER_ADDR") or _first_host(environment["SLURM_JOB_NODELIST"])
    return [
        f"--nnodes={count}",
        f"--node_rank={environment['SLURM_NODEID']}",
        f"--master_addr={first}",
        f"--master_port={environment.get('MASTER_PORT', _PORT)}",
    ]


def _first_host(nodes: str) -> str:
    """The first machine of SLURM's list (``node[01-04]`` is SLURM's own notation, so SLURM reads it)."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"SLURM_JOB_NODELIST={nodes}: scontrol cannot read it ({error}); set MASTER_ADDR.") from error
    return done.stdout.split()[0]
