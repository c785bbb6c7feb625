"""Work done ahead of time: a thread that prepares what comes next, and copies to the device beside its computing.

In: a function and its arguments, in order. Out: its results, in the same order, ready when they are asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Generator[tuple[Item, Result], None, None]:
    """Yield each item with what `function` makes of it, up to `depth` of them made by a thread before they are due.

    depth 0: made when they are due, without a thread. What `function` raises is raised here. The thread ends with this
    generator: at the last item, or when it is closed.
    """
    if not depth:
        yield from ((item, function(item)) for item in items)
        return
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(1, "ahead")
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > depth:
                due, future = waiting.popleft()
                yield due, future.result()
        for due, future in waiting:
            yield due, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class Moved(NamedTuple):
    """A tensor on the device; copied: the event after which it may be used, or None if it may be at once."""

    tensor: Tensor
    copied: torch.cuda.Event | None


class Mover:
    """Copies tensors of the host to the device; to a GPU from pinned memory, while it computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, tensor: Tensor) -> Moved:
        """Start the copy; any thread may call this."""
        if self.stream is None or tensor.device.type == self.device.type:
            return Moved(tensor.to(self.device), None)
        with torch.cuda.stream(self.stream):  # which also makes the device this thread's own
            moved = tensor.pin_memory().to(self.device, non_blocking=True)
            return Moved(moved, self.stream.record_event())

    def receive(self, moved: Moved) -> Tensor:
        """Return the tensor, for use on the current stream."""
        if moved.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(moved.copied)
            moved.tensor.record_stream(stream)  # its memory was allocated on the other one
        return moved.tensor
