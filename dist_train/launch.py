"""Starts a command of dist-train on all processes of this machine: chooses the accelerate launch command and runs it.

In: options, this machine's GPUs and cores, the variables that SLURM, Kubernetes or torchrun's users set. Out: the
command line, and after running it the command's own exit code, which accelerate launch does not pass on.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import psutil
import torch

from dist_train.config import InputError

logger = logging.getLogger(__name__)

RESUMABLE = 75
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PORT = 29500
OWN_VALUES = ("--processes", "--nodes", "--precision", "--log_dir")
OWN_FLAGS = ("--dry-run", "-h", "--help")
# what says how many machines there are; read here, so it must not be read again by torchrun or the training
PLACE_NAMES = (
    "PET_NNODES",
    "PET_NODE_RANK",
    "PET_NPROC_PER_NODE",
    "PET_MASTER_ADDR",
    "PET_MASTER_PORT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
    "RANK",
)


@dataclass(frozen=True)
class Place:
    """The machines of one training, which of them this is, and where rank 0 is met."""

    nodes: int = 1
    node_rank: int = 0
    main_host: str = ""
    port: int = PORT
    source: str = "this machine"


def split_arguments(arguments: list[str]) -> list[str]:
    """Put launch's own options first, then -- and what belongs to the command that it starts."""
    own: list[str] = []
    rest: list[str] = []
    left = iter(arguments[1:])
    for argument in left:
        name, equals, _ = argument.partition("=")
        if argument == "--":
            rest += left
        elif name in OWN_VALUES:
            own += [argument] if equals else [argument, *([value] if (value := next(left, None)) else [])]
        elif name in OWN_FLAGS and not (rest and name != "--dry-run"):
            own.append(argument)
        else:
            rest.append(argument)
    return ["launch", *own, "--", *rest]


def find_place(environment: Mapping[str, str], nodes: int | None = None) -> Place:
    """Return the place that the environment describes; `nodes` says how many machines where it does not.

    Raises InputError where several trainings would start that each believe they are alone.
    """
    if "LOCAL_RANK" in environment or _number(environment, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        raise InputError("launch: runs inside another launcher; start it once per machine, or start dist-train train")
    if "SLURM_STEP_NUM_NODES" in environment:
        place = _slurm(environment)
    elif _number(environment, "SLURM_JOB_NUM_NODES", 1) > 1:
        raise InputError("launch: this SLURM job has several nodes; put srun before it (launch/slurm/train.sbatch)")
    elif "PET_NNODES" in environment or "PET_MASTER_ADDR" in environment:
        place = _variables(environment, "PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT", nodes)
    elif "MASTER_ADDR" in environment and "RANK" in environment:
        place = _variables(environment, "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", nodes)
    else:
        place = Place()
    if nodes is not None and nodes != place.nodes and place.source != "this machine":
        raise InputError(f"--nodes: {nodes} machines, but {place.source} says {place.nodes}")
    if (nodes or place.nodes) > 1 and not place.main_host:
        raise InputError(
            f"--nodes: {nodes or place.nodes} machines, but nothing says where the first is; set PET_MASTER_ADDR (its "
            "address) and PET_NODE_RANK (0 on the first) on each"
        )
    return place


def _slurm(environment: Mapping[str, str]) -> Place:
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", 1)
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", nodes)
    if tasks != nodes:
        raise InputError(
            f"launch: srun started {tasks} tasks on {nodes} nodes; one per node is wanted: srun --ntasks-per-node=1"
        )
    rank = _number(environment, "SLURM_NODEID", 0)
    port = 20000 + _number(environment, "SLURM_JOB_ID", 0) % 10000  # below the ports that systems give to clients
    return Place(nodes, rank, first_host(environment.get("SLURM_STEP_NODELIST", "")), port, "SLURM")


def first_host(nodelist: str) -> str:
    """Return the first host of SLURM's compressed list: gpu-[007-009,12],login -> gpu-007."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0] if first else "")


def _variables(environment: Mapping[str, str], count: str, rank: str, host: str, port: str, nodes: int | None) -> Place:
    """Return the place that variables of the given names describe, one process each being one launch."""
    found = Place(
        _number(environment, count, nodes or 1),
        _number(environment, rank, 0),
        environment.get(host, ""),
        _number(environment, port, PORT),
        count,
    )
    if found.nodes > 1 and rank not in environment:
        raise InputError(f"{rank}: missing, though {count} asks for {found.nodes} machines")
    if not 0 <= found.node_rank < found.nodes:
        raise InputError(f"{rank}: {found.node_rank} is not one of {found.nodes} machines (0 to {found.nodes - 1})")
    return found


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "")
    if value and not value.isdecimal():
        raise InputError(f"{name}: {value!r} is not allowed; expected a whole number")
    return int(value or default)


def choose_processes(environment: Mapping[str, str], asked: int | None = None) -> tuple[int, int]:
    """Return how many processes to start on this machine, and on how many GPUs (0: they compute on the CPU).

    One per GPU; on a CPU one, which uses all cores and takes its batch statistics over whole batches.
    """
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    gpus = 0 if on_cpu or not torch.accelerator.is_available() else torch.accelerator.device_count()
    if asked is None and environment.get("PET_NPROC_PER_NODE", "").isdecimal():
        asked = int(environment["PET_NPROC_PER_NODE"])
    processes = asked or gpus or 1
    if gpus and processes > gpus:
        raise InputError(f"--processes: {processes} on a machine with {gpus} GPUs; one GPU each is needed")
    return processes, gpus


def choose_command(arguments: Sequence[str], processes: int, gpus: int, place: Place, log_dir: str | None) -> list[str]:
    """Return the accelerate launch command that starts `dist-train *arguments` on `processes` processes per machine."""
    total = processes * place.nodes
    flags = ["--multi_gpu"] if total > 1 else [] if gpus else ["--cpu"]  # --multi_gpu also starts processes on CPUs
    flags += ["--num_processes", str(total), "--num_machines", str(place.nodes)]
    if place.nodes > 1:
        flags += ["--machine_rank", str(place.node_rank), "--main_process_ip", place.main_host]
        flags += ["--main_process_port", str(place.port), "--rdzv_backend", "static", "--same_network"]
    elif total > 1:
        flags += ["--main_process_port", "0"]  # any that is free
    flags += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # the config decides
    if gpus:
        flags += ["--gpu_ids", "all"]
    elif "OMP_NUM_THREADS" not in os.environ:
        flags += ["--num_cpu_threads_per_process", str(max(1, len(os.sched_getaffinity(0)) // processes))]
    if log_dir and total > 1:
        flags += ["--tee", "3", "--log_dir", f"{log_dir}/node{place.node_rank}"]
    return ["accelerate", "launch", *flags, "-m", "dist_train", *arguments]


def run(command: Sequence[str]) -> int:
    """Run a command of choose_command() in this process, and return the exit code of what it started.

    SIGTERM, SIGINT and SIGUSR1 are passed on to the processes, which save and end; nobody is killed for them.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in PLACE_NAMES:
        os.environ.pop(name, None)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # else torchrun takes ours and kills the processes 30 s later
    for number in FORWARDED:
        signal.signal(number, _forward)
    try:
        launch_command(launch_command_parser().parse_args(list(command[2:])))
    except ChildFailedError as error:
        return _exit_code({failure.exitcode for failure in error.failures.values()})
    except subprocess.CalledProcessError as error:
        return _exit_code({error.returncode})
    except SignalException as error:  # torch before 2.9 keeps our signals to itself and gives the processes 30 s
        return RESUMABLE if error.sigval in FORWARDED else 128 + error.sigval
    except (ConnectionError, DistError) as error:
        raise InputError(f"launch: the machines cannot meet: {' '.join(str(error).split())[:300]}") from error
    return 0


def _forward(number: int, frame: FrameType | None) -> None:
    """Pass a signal on to the processes that were started; end if there are none yet.

    SIGINT goes on as SIGTERM: a terminal has sent it to all already, and a second one would interrupt them at once.
    """
    children = psutil.Process().children()
    if not children:
        sys.exit(RESUMABLE)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)


def _exit_code(codes: set[int]) -> int:
    """Return one exit code for those of the processes; one that a signal ended before it could save lost nothing."""
    if codes <= {RESUMABLE, *(-number for number in FORWARDED)}:
        return RESUMABLE
    return 2 if codes == {2} else 1
