"""Starting the processes of a run: one command on one device or on many."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vzip.errors import ConfigError, VzipError

from .settings import LaunchSettings

_PORT = "29511"


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
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={launch.num_processes}"]
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
    """Prints the command and runs it to its end.

    Raises:
        LaunchError: it ended with another code than 0.
    """
    print(f"starting: {shlex.join(command)}", file=sys.stderr, flush=True)
    code = subprocess.run(list(command), check=False).returncode
    if code:
        raise LaunchError(f"the processes ended with code {code}; the first of their messages above says why.")


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
