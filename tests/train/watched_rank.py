"""A rank that joins the others under the watch, and then meets the fate that the test names."""

import os
import signal
import time

import torch

from dist_train.cluster.watch import Watch
from dist_train.errors import WorkError
from dist_train.train.engine import init_process_group
from dist_train.train.record import start_console_log


def meet(fate: str, timeout_s: float) -> None:
    place = init_process_group(timeout_s)
    start_console_log(place.rank)
    with Watch(place, timeout_s):
        torch.distributed.barrier()
        if place.rank == 1:
            if fate == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fate == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fate == "hangs":
                time.sleep(1000)
            if fate == "fails":
                raise WorkError("a file of mine is damaged")
        torch.distributed.all_reduce(torch.ones(1))
