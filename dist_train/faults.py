"""What can befall a training: a signal, a loss that is not finite, a process that dies.

In: signals and losses. Out: after each step one verdict, the same on all processes, agreed on over a group of their
hosts, so that no process waits for another that has left and no device waits for its host.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn

from dist_train.checkpoint import Checkpointer
from dist_train.data.loader import Batch, UnreadableImage
from dist_train.files import write_file
from dist_train.processes import longest_wait
from dist_train.state import TrainState

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
logger = logging.getLogger(__name__)

ROLL_CALL_SECONDS = 2
GLOO_SIGNS = ("gloo", "pair closure")
"""Of errors that gloo raises: its source file, but for those of a wait that ends as another one timed out."""


class Interrupted(Exception):
    """A signal ended the training after its state was saved: it can be resumed."""


class TrainingError(RuntimeError):
    """The training cannot go on; the message says why and what to do."""


class Watch:
    """Ends a training that is told to stop, or whose losses are not finite, with its state saved.

    max_bad_steps: optimizer steps in a row whose loss is not finite after which the training ends; such steps
    change no weights. names: of the training samples, by index.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        checkpointer: Checkpointer,
        *,
        max_bad_steps: int = 3,
        names: list[str] | None = None,
    ) -> None:
        self.accelerator, self.checkpointer = accelerator, checkpointer
        self.max_bad_steps, self.names = max_bad_steps, names
        self.signal: str | None = None
        # gloo, not the training's own backend: the agreement is between hosts, and no device waits for it
        several = accelerator.num_processes > 1
        self.group: Any = distributed.new_group(backend="gloo", timeout=longest_wait()) if several else None
        self.bad = self.stop = False
        self._seen: list[Tensor] = []
        self._copied = torch.cuda.Event() if accelerator.device.type == "cuda" else None
        self._spoiled: list[Batch] = []
        self._buffers: list[Tensor] = []
        self._kept: list[Tensor] = []

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Note signals while inside; a second SIGINT interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self.signal == "SIGINT":
            raise KeyboardInterrupt
        self.signal = self.signal or name

    def batches(self, batches: Iterable[Batch], state: TrainState) -> Iterator[Batch]:
        """Yield the batches; where one cannot be read, save the state and raise UnreadableImage on all processes."""
        try:
            yield from batches
        except UnreadableImage:
            if state.progress.step:
                self.checkpointer.save(state)
                self.checkpointer.flush()
            raise

    def before_step(self, model: nn.Module) -> None:
        """Keep a copy of the model's buffers (batch statistics), which a forward pass changes."""
        if not self._buffers:
            self._buffers = list(model.buffers())
            self._kept = [buffer.clone() for buffer in self._buffers]
        _copy(self._kept, self._buffers)

    def see(self, loss: Tensor) -> None:
        """Look at a loss of the step under way, before its backward pass is asked for."""
        finite = torch.isfinite(loss.detach())
        if self._copied:  # the device is then busy with the backward pass while its host learns the verdict
            finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            self._copied.record()
        self._seen.append(finite)

    def agree(self) -> bool:
        """Return whether a loss of the step is not finite on any process; a collective call."""
        if self._copied:
            self._copied.synchronize()
        bad = not all(finite.tolist() for finite in self._seen)  # they are in the memory of the host
        flags = torch.tensor([bad, self.signal is not None], dtype=torch.int32)
        if self.group:
            distributed.all_reduce(flags, distributed.ReduceOp.MAX, self.group)
        self._seen.clear()
        self.bad, self.stop = map(bool, flags.tolist())
        if self.bad:
            _copy(self._buffers, self._kept)
        return self.bad

    def after_step(self, state: TrainState, batch: Batch) -> None:
        """Raise Interrupted or TrainingError, with the state saved, if the step's verdict says so."""
        self._spoiled = [*self._spoiled, batch] if self.bad else []
        if len(self._spoiled) >= self.max_bad_steps:
            self._give_up(state)
        if self.stop:
            self.checkpointer.save(state)
            self.checkpointer.flush()
            raise Interrupted(
                f"stopped by {self.signal or 'a signal to another process'} after step {state.progress.step}, "
                "state saved; go on with --resume auto"
            )

    def _give_up(self, state: TrainState) -> None:
        """Save the state before the bad steps, list their samples and raise TrainingError."""
        first = min(range(len(self._spoiled)), key=lambda i: (self._spoiled[i].start, -i))  # of the epoch under way
        state.progress.step -= len(self._spoiled) - first
        batches = state.parts.get("batches")
        if batches:
            batches.load_state_dict({**batches.state_dict(), "position": self._spoiled[first].start})
        self.checkpointer.save(state)
        self.checkpointer.flush()
        file = self.checkpointer.folder.parent / "bad_samples.txt"
        step = state.progress.step + 1 - first
        indices = [(step + i, n) for i, batch in enumerate(self._spoiled) for n in batch.samples.tolist()]
        found = sorted(gather_object([(at, self.names[n] if self.names else str(n)) for at, n in indices]))
        if self.accelerator.is_main_process:
            text = "".join(f"step {at}: {name}\n" for at, name in found)
            write_file(file, lambda path: path.write_bytes(os.fsencode(text)))
        raise TrainingError(
            f"the loss was not finite in {len(self._spoiled)} steps in a row, the first of them step {step}; the state "
            f"before it is saved, its samples are listed in {file}. If they are at fault, mend them and go on with "
            "--resume auto; if the training diverged, start anew with a lower optim.lr, train.clip_grad or "
            "train.precision: no"
        )

    def explain(self, error: RuntimeError) -> TrainingError | None:
        """Return what to say of an error that another process's end may have caused, or None if it is another's."""
        lost = isinstance(error, distributed.DistError) or any(sign in str(error) for sign in GLOO_SIGNS)
        if self.group is None or not lost or isinstance(error, TrainingError):
            return None
        logger.error(
            "process %d has lost contact: %s does not answer, it has died or its network has gone (%s)",
            self.accelerator.process_index,
            self._roll_call(),
            str(error).splitlines()[0],
        )
        return TrainingError("ended, as a process is gone; start the same command with --resume auto to go on")

    def _roll_call(self) -> str:
        """Return in words which processes do not answer, over the launcher's store, which outlives them."""
        gone: list[int] = []

        def call() -> None:
            with suppress(RuntimeError):  # the store is gone with the process or machine that held it
                store = distributed.distributed_c10d._get_default_store()
                store.set(f"alive/{self.accelerator.process_index}", "")
                time.sleep(ROLL_CALL_SECONDS)
                gone.extend(n for n in range(self.accelerator.num_processes) if not store.check([f"alive/{n}"]))

        # in a thread that may be left behind: cut off from its machine, the store answers never and knows no timeout
        caller = threading.Thread(target=call, daemon=True)
        caller.start()
        caller.join(2 * ROLL_CALL_SECONDS)
        return f"process {', '.join(map(str, gone))}" if gone else "another one"


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for dtype in {target.dtype for target in targets}:  # one kernel copies many tensors, if they are of one type
        rows = [row for row, target in enumerate(targets) if target.dtype == dtype]
        torch._foreach_copy_([targets[row] for row in rows], [sources[row] for row in rows])
