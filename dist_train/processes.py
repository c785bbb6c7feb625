"""Which processes, device and precision a training has: accelerate's Accelerator, checked against the launcher.

In: config and the launcher's environment. Out: an Accelerator that sees every process that was started.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dist_train.config import InputError, TrainConfig

logger = logging.getLogger(__name__)

MULTI_CPU_WAY = "use accelerate launch --config_file launch/accelerate/multi_cpu.yaml (multi_gpu.yaml for GPUs)"


def default_accelerator() -> Accelerator:
    """Return an Accelerator on the CPU where no accelerator is there: only then does it see n CPU processes."""
    return Accelerator(cpu=not torch.accelerator.is_available())


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Return the Accelerator for this machine: on the CPU where no accelerator is there.

    Raises InputError where launcher and Accelerator disagree on the number of processes, and for settings that
    the device cannot do.
    """
    cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    precision = choose_precision(config.precision, cpu)
    check_launch()
    _meet_anew(cpu)
    sent = DDPCommunicationHookType.BF16 if config.bf16_gradients else DDPCommunicationHookType.NO
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=sent),
            InitProcessGroupKwargs(timeout=longest_wait()),
        ],
    )
    _check_processes(accelerator)
    if cpu and config.sync_batchnorm:
        raise InputError("train.sync_batchnorm: true is for GPUs; torch has no SyncBatchNorm on a CPU")
    if config.ema and accelerator.distributed_type == DistributedType.FSDP:
        raise InputError("train.ema: cannot average sharded weights (FSDP); set train.ema: 0")
    if config.bf16_gradients and accelerator.distributed_type == DistributedType.FSDP:
        raise InputError("train.bf16_gradients: true is for DDP, and this is FSDP; set it to false")
    _set_threads(accelerator, cpu)
    if cpu:
        _keep_freed_memory()
    return accelerator


def _meet_anew(cpu: bool) -> None:
    """After a restart by the launcher (--max_restarts), meet under names of this attempt.

    torch's static rendezvous keeps one store over all attempts, which still holds the addresses of the processes that
    died: by torch's own names the new ones often find those, and fail.
    """
    attempt, agent = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if attempt == "0" or agent != "True":
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=longest_wait())
    distributed.init_process_group(
        "gloo" if cpu else None,
        store=PrefixStore(f"attempt_{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=longest_wait(),
    )


def choose_precision(precision: str, cpu: bool) -> str:
    """Return no, fp16 or bf16 for a config's precision; InputError for fp16 on a CPU."""
    if precision == "fp16" and cpu:
        raise InputError("train.precision: fp16 needs a GPU; on a CPU use bf16, no, or auto")
    if precision != "auto":
        return precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched in ("fp16", "bf16"):
        return choose_precision(launched, cpu)
    if cpu:
        return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _cpu_computes_bf16() else "no"
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _cpu_computes_bf16() -> bool:
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def check_launch() -> None:
    """Refuse a launcher that meant several processes and started one, before anything waits for the others."""
    rank = any(name in os.environ for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"))
    if rank:
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            f"WORLD_SIZE: {os.environ['WORLD_SIZE']} processes are asked for, but there is no RANK; {MULTI_CPU_WAY}"
        )
    # accelerate launch sets MASTER_ADDR for several processes, but starts only one with --cpu or MULTI_CPU
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise InputError(
            "MASTER_ADDR: accelerate launch was asked for several processes but started one (it does so with --cpu and "
            f"with distributed_type MULTI_CPU); {MULTI_CPU_WAY}, or unset MASTER_ADDR for one process"
        )


def longest_wait() -> timedelta:
    """Return after how long a process that waits for the others gives up (a cut network, a frozen machine)."""
    seconds = os.environ.get("DIST_TRAIN_TIMEOUT", "600")
    if not seconds.isdecimal() or seconds == "0":
        raise InputError(f"DIST_TRAIN_TIMEOUT: {seconds!r} is not allowed; expected a whole number of seconds")
    return timedelta(seconds=int(seconds))


def _check_processes(accelerator: Accelerator) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_NUM_PROCESSES"):
        asked = os.environ.get(name, str(accelerator.num_processes))
        if asked != str(accelerator.num_processes):
            raise InputError(
                f"{name}: {asked} processes are asked for, but this training is of {accelerator.num_processes}; "
                f"{MULTI_CPU_WAY}"
            )


def _set_threads(accelerator: Accelerator, cpu: bool) -> None:
    """Share the cores between the processes of this machine, where the launcher left each with one thread."""
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if cpu and launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


def _keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees: given back to the system, it would be paged in anew by the next.

    On a CPU that costs 6 % to a quarter of the step. Elsewhere than on glibc nothing happens.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; older ones refuse more than 32 MiB
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def on_main(accelerator: Accelerator, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run `function` on the main process only; return its result, or raise its InputError, on all."""
    outcome = _attempt(function, arguments) if accelerator.is_main_process else (None, None)
    shared = [outcome]
    broadcast_object_list(shared)
    if shared[0][1] is not None:
        raise InputError(shared[0][1])
    return shared[0][0]


def together(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run `function` on every process; an InputError of any is raised on all."""
    result, fault = _attempt(function, arguments)
    _raise_first(gather_object([fault]))
    return result


def local_main_first(accelerator: Accelerator, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run `function` on each machine's main process, then on the others; an InputError of any is raised on all.

    Raises InputError also where the others have waited too long.
    """
    several = accelerator.num_processes > 1
    # gloo, which raises an error after too long a wait; NCCL ends the process
    group: Any = distributed.new_group(backend="gloo", timeout=longest_wait()) if several else None
    result = None
    for turn in (True, False):
        own, fault = _attempt(function, arguments) if accelerator.is_local_main_process == turn else (None, None)
        result = result if own is None else own
        faults = [fault] * accelerator.num_processes
        try:
            if group:
                distributed.all_gather_object(faults, fault, group)
        except RuntimeError as error:
            waited = (
                f"process {accelerator.process_index} has waited {longest_wait().total_seconds():.0f} s for one that "
                "reads data or weights, or it has died; set DIST_TRAIN_TIMEOUT to more seconds if these take longer"
            )
            if not accelerator.is_local_main_process:  # the errors of those are told
                logger.error(waited)
            raise InputError(waited) from error
        _raise_first(faults)
    return result


def _raise_first(faults: list[str | None]) -> None:
    for fault in filter(None, faults):
        raise InputError(fault)


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str | None]:
    """Return (result, None) or, of bad input and files that cannot be used, (None, what is wrong)."""
    try:
        return function(*arguments), None
    except InputError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{error.filename}: {error.strerror}" if error.filename else str(error)
