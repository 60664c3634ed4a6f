"""Steps whose loss is NaN or infinite: skipped as often as the recipe allows, then the end of the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_train.errors import WorkError
from dist_train.files import write_atomically
from dist_train.place import Place
from dist_train.train.ranks import gather

log = logging.getLogger(__name__)

BAD_BATCH_NAME = "bad_batch.json"


class BadSteps:
    """Counts them. All ranks call each method together.

    allowed: how many to skip. sample_names: the names of this rank's samples of a step.
    """

    def __init__(self, allowed: int, run: Path, place: Place, sample_names: Callable[[int], list[str]]) -> None:
        self.allowed, self.place = allowed, place
        self.skipped = self.skipped_since_log = 0
        self._file, self._sample_names = run / BAD_BATCH_NAME, sample_names
        self._losses: list[tuple[int, Tensor]] = []  # of this rank since the last logged step, on the device
        self._statistics: list[Tensor] = []

    def before_forward(self, model: nn.Module) -> None:
        """Keep what a forward pass changes, where the step may be skipped."""
        if self.allowed:
            self._statistics = [buffer.clone() for buffer in model.buffers()]

    def skips(self, model: nn.Module, loss: Tensor, step: int) -> bool:
        """Whether to skip a step for the loss of some rank. Raises WorkError when that was one too many.

        Without train.skip_bad_steps nothing waits for the loss here; `end_run` looks back.
        """
        if not self.allowed:
            self._losses.append((step, loss.detach().clone()))
            return False
        bad = (~loss.detach().isfinite()).to(torch.int32)
        if self.place.world_size > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if not bad:
            return False
        if self.skipped == self.allowed:
            self._end(step, f" after train.skip_bad_steps ({self.allowed}) others")
        for buffer, before in zip(model.buffers(), self._statistics, strict=True):
            buffer.copy_(before)
        self.skipped += 1
        self.skipped_since_log += 1
        self._write(step)
        if self.place.rank == 0:
            log.warning(
                "step %d skipped, %d of train.skip_bad_steps %d: the loss is not finite; its samples are in %s",
                step + 1,
                self.skipped,
                self.allowed,
                self._file,
            )
        return True

    def end_run(self, logged: int) -> None:
        """Raise WorkError naming the first step whose loss was not finite; `logged` where no rank noted one."""
        mine = next((step for step, loss in self._losses if not loss.isfinite()), -1)
        firsts = [first for first in gather(mine, self.place) if first >= 0]
        self._end(min(firsts, default=logged - 1), "")

    def logged(self) -> None:
        """The losses so far are in the record, and finite."""
        self._losses.clear()
        self.skipped_since_log = 0

    def _end(self, step: int, after: str) -> None:
        self._write(step)
        raise WorkError(
            f"the loss is not finite at step {step + 1}{after}; its samples are in {self._file}; "
            "lower optim.lr, set optim.clip_norm, raise deepspeed.precision or set train.skip_bad_steps, then "
            "--resume auto"
        )

    def _write(self, step: int) -> None:
        names = gather(self._sample_names(step), self.place)
        if self.place.rank == 0:
            samples = [{"rank": rank, "name": name} for rank, own in enumerate(names) for name in own]
            document = json.dumps({"step": step + 1, "samples": samples}, indent=1) + "\n"
            write_atomically(self._file, document.encode())
