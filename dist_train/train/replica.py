"""ZeRO 0: every rank has the whole model, its gradients and its optimizer; only gradients are exchanged.

DeepSpeed's engine does nothing for such a step that its user would see, but makes the host take 1.4 times as long for a
small one (`python -m benchmarks engine --arm host`), and exchanges gradients only after the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_train.models.build import Classifier
from dist_train.train.exchange import GradientExchange, forward_order


class Replica:
    """A model and its optimizer on this rank, with the methods of DeepSpeed's engine that this trainer calls.

    accumulation: backward passes of a step. clip_norm: the gradient's largest L2 norm, 0 for any. Parameters, gradients
    and the optimizer's state are float32. All ranks build it together, and start from rank 0's weights.
    """

    def __init__(
        self,
        module: Classifier,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        accumulation: int,
        clip_norm: float,
        world_size: int,
    ) -> None:
        self.module, self.optimizer, self.device = module, optimizer, device
        self.basic_optimizer = optimizer
        self.accumulation, self.clip_norm = accumulation, clip_norm
        self.keeps_gradients = False
        """Whether gradients stay where they are from step to step, as a CUDA graph needs them."""
        self.passes = 0
        """Backward passes since the last step."""
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._exchange: GradientExchange | None = None
        if world_size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor.detach(), 0)
            self._exchange = GradientExchange(forward_order(module), world_size)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        return self.module(*inputs)

    def train(self) -> None:
        """As DeepSpeed's; see `nn.Module.train`."""
        self.module.train()

    def eval(self) -> None:
        """As DeepSpeed's; see `nn.Module.eval`."""
        self.module.eval()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss; after the last of a step they are the mean of all ranks'."""
        self.passes += 1
        if self._exchange is None or self.passes < self.accumulation:
            self.accumulate(loss)
            return
        self._exchange.begin()
        self.accumulate(loss)
        self._exchange.finish()

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss on this rank alone."""
        (loss / self.accumulation if self.accumulation > 1 else loss).backward()

    def step(self) -> None:
        """Update the weights if the last backward pass was the step's last one."""
        if self.passes < self.accumulation:
            return
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.trained, self.clip_norm, foreach=True)
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients, and the passes that they are of."""
        self.passes = 0
        if not self.keeps_gradients:
            for parameter in self.trained:
                parameter.grad = None
        elif self.accumulation > 1:  # else the next backward pass overwrites them
            torch._foreach_zero_([parameter.grad for parameter in self.trained if parameter.grad is not None])

    def zero_optimization_stage(self) -> int:
        """As DeepSpeed's."""
        return 0

    def fp16_enabled(self) -> bool:
        """As DeepSpeed's."""
        return False

    def get_global_grad_norm(self) -> None:
        """As DeepSpeed's where it does not know; the gradients are there to look at."""

    def destroy(self) -> None:
        """As DeepSpeed's: let go of what outlives the object."""
        self.drop_gradients()
