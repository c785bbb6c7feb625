"""Exact sums of loss and confusion matrix, over batches and over processes.

Sums stay on the device until `reduce` brings them, added over the processes, to the host. Figures follow from
the sums, and adding is exact, so they do not depend on how samples were split.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True)
class Results:
    """Figures of `count` samples: summed loss and confusion (int64 [K, K], rows real, columns predicted)."""

    loss_sum: float
    confusion: Tensor

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self.confusion.sum())

    @property
    def loss(self) -> float:
        """Mean loss, in nats; nan without samples."""
        return self.loss_sum / self.count if self.count else float("nan")

    @property
    def accuracy(self) -> float:
        """Share of samples whose predicted class is the real one, 0..1; nan without samples."""
        return int(self.confusion.trace()) / self.count if self.count else float("nan")

    @property
    def macro_f1(self) -> float:
        """Mean over classes of F1, 0..1; a class neither real nor predicted counts as 0, as in sklearn."""
        right = self.confusion.diagonal().double()
        total = (self.confusion.sum(0) + self.confusion.sum(1)).double()
        return float((2 * right / total.clamp(min=1)).mean())

    def __sub__(self, other: Results) -> Results:
        return Results(self.loss_sum - other.loss_sum, self.confusion - other.confusion)


LOSS_STEP = 2.0**-20
"""Losses of batches are rounded to multiples of this, so that adding them in float64 is exact in any order."""


class Sums:
    """Sums of one process, on its device."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=exact, device=device)
        self.confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)

    def update(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its summed loss, logits [B, K], labels int64 [B] or float [B, K]; no synchronisation."""
        if labels.ndim == 2:
            labels = labels.argmax(1)
        cells = labels * self.num_classes + logits.detach().argmax(1)
        self.confusion.scatter_add_(0, cells, torch.ones_like(cells))
        self.loss += (loss_sum.detach().to(self.loss.dtype) / LOSS_STEP).round() * LOSS_STEP

    def reduce(self, accelerator: Accelerator) -> Results:
        """Return the sums over all processes (a collective call), the same on each."""
        loss = accelerator.reduce(self.loss, "sum")
        confusion = accelerator.reduce(self.confusion, "sum")
        return Results(float(loss), confusion.cpu().view(self.num_classes, self.num_classes))


class Meter:
    """Figures and speed of the training epoch under way, as a whole and since the last look at them."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums: Sums | None = None  # made at the first batch, which shows the number of classes
        self.seen: Results | None = None
        self._restored = (0.0, 0.0)
        self.start_clock()

    def start_clock(self) -> None:
        """Begin to count the epoch's seconds (behind those that load_state_dict brought)."""
        now = time.perf_counter()
        self._started, self._looked = now - self._restored[0], now - self._restored[1]
        self._restored = (0.0, 0.0)

    def update(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch, as Sums.update does."""
        self.sums = self.sums or Sums(logits.shape[1], self.accelerator.device)
        self.sums.update(loss_sum, logits, labels)

    def look(self) -> tuple[Results, Results, float]:
        """Return (epoch so far, since the last look, images per second since then); a collective call."""
        nothing = Results(0.0, torch.zeros(1, 1, dtype=torch.int64))
        total, now = self.sums.reduce(self.accelerator) if self.sums else nothing, time.perf_counter()
        recent = total - self.seen if self.seen else total
        speed = recent.count / (now - self._looked)
        self.seen, self._looked = total, now
        return total, recent, speed

    def end_epoch(self) -> tuple[Results, float]:
        """Return (the whole epoch, its images per second) and begin anew; a collective call."""
        total, _, _ = self.look()
        self.sums = self.seen = None
        return total, total.count / self.seconds

    @property
    def seconds(self) -> float:
        """Seconds since the epoch began."""
        return time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        """Return sums over all processes and seconds; a collective call."""
        total = asdict(self.sums.reduce(self.accelerator)) if self.sums else None
        seconds = (self.seconds, time.perf_counter() - self._looked)
        return {"total": total, "seen": asdict(self.seen) if self.seen else None, "seconds": seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`: the main process takes the sums of all, for any number of processes."""
        self._restored = tuple(state["seconds"])
        self.seen = Results(**state["seen"]) if state["seen"] else None
        self.sums = None
        if state["total"]:
            total = Results(**state["total"])
            self.sums = Sums(len(total.confusion), self.accelerator.device)
            if self.accelerator.is_main_process:
                self.sums.loss += total.loss_sum
                self.sums.confusion += total.confusion.flatten().to(self.accelerator.device)
