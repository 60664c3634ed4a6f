"""Ranks that exchange gradients, case after case in one process, and write what became of them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.train.exchange import GradientExchange
from tests.train.forked_ranks import run_on

WIDTH, SAMPLES = 13, 5
TIMEOUT_S = 60  # of a collective: ranks that do not send the same hang


class Net(nn.Module):
    """Odd sizes, a scalar, a frozen layer, layers that only some forward passes reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 17)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Linear(17, 17).requires_grad_(False)
        self.often = nn.Linear(17, 17, bias=False)
        self.never = nn.Linear(3, 3)
        self.low = nn.Linear(17, 11).to(torch.bfloat16)
        self.last = nn.Linear(11, 3)

    def forward(self, inputs: Tensor, whole: bool) -> Tensor:
        hidden = functional.gelu(self.first(inputs)) * self.scale
        hidden = self.frozen(hidden)
        if whole:
            hidden = hidden + self.often(hidden)
        return self.last(functional.gelu(self.low(hidden.bfloat16())).float())


def make_net(compiled: bool = False) -> Net:
    """The same on every rank."""
    torch.manual_seed(3)
    net = Net()
    if compiled:
        net.first.compile()
    return net


def inputs_of(step: int, micro: int, rank: int) -> Tensor:
    """Those of a micro-batch; of other size on each rank."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro + rank)
    return (rank + 1) * torch.randn(SAMPLES, WIDTH, generator=generator)


def reaches_all(case: dict[str, Any], micro: int, rank: int) -> bool:
    """Whether a forward pass reaches `often`: by the case, always, not on rank 1, or in the first micro-batch only."""
    return {"always": True, "not_on_rank_1": rank != 1, "first_micro_batch": micro == 0}[case["reach"]]


def own_gradients(case: dict[str, Any], net: Net, step: int, rank: int) -> dict[str, Tensor | None]:
    """A rank's gradients of a step, float64 sums of those of the micro-batches, by plain torch."""
    sums: dict[str, Tensor | None] = {name: None for name, _ in net.named_parameters()}
    for micro in range(case["accumulation"]):
        net.zero_grad(set_to_none=True)
        net(inputs_of(step, micro, rank), reaches_all(case, micro, rank)).square().sum().backward()
        for name, parameter in net.named_parameters():
            if parameter.grad is not None:
                before = sums[name]
                sums[name] = parameter.grad.double() if before is None else before + parameter.grad.double()
    return sums


def run_case(case: dict[str, Any], rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """The gradients after each of the case's steps."""
    net = make_net(case["compiled"])
    exchange = GradientExchange(net.parameters(), world_size, bucket_mb=case["bucket_mb"])
    found = []
    for step in range(case["steps"]):
        net.zero_grad(set_to_none=step % 2 == 0)
        for micro in range(case["accumulation"]):
            if micro == case["accumulation"] - 1:
                exchange.begin()
            net(inputs_of(step, micro, rank), reaches_all(case, micro, rank)).square().sum().backward()
        exchange.finish()
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    return found


def train_case(case: dict[str, Any], rank: int, world_size: int) -> list[Tensor]:
    """The weights and last gradients of a short training; from step `stop_after` on with everything new."""

    def build(state: dict[str, Any] | None) -> tuple[Net, torch.optim.Optimizer, GradientExchange]:
        net = make_net()
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.03, momentum=0.9)
        if state is not None:
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
        return net, optimizer, GradientExchange(net.parameters(), world_size, bucket_mb=case["bucket_mb"])

    net, optimizer, exchange = build(None)
    for step in range(case["steps"]):
        optimizer.zero_grad()
        if step == case["stop_after"]:
            net, optimizer, exchange = build({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
        exchange.begin()
        net(inputs_of(step, 0, rank), whole=True).square().mean().backward()
        exchange.finish()
        optimizer.step()
    gradients = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    return [*(parameter.detach() for parameter in net.parameters()), *gradients]


def early_case(case: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """What the first collective has done when the backward pass reaches the first layer, its last."""
    net = make_net()
    net.never.requires_grad_(False)  # those behind it would wait for its gradient
    exchange = GradientExchange(net.parameters(), world_size, bucket_mb=case["bucket_mb"])
    started, seen = [], {}
    real = torch.distributed.all_reduce

    def watched(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        started.append((tensor, real(tensor, *arguments, **options)))
        return started[-1][1]

    def at_the_first_layer(_: Tensor) -> None:
        seen["started"] = len(started)
        tensor, work = started[0]
        work.wait()  # hangs unless every rank has sent it by now
        seen["arrived"] = tensor.clone()

    net.first.weight.register_hook(at_the_first_layer)  # before its gradient is there
    torch.distributed.all_reduce = watched
    exchange.begin()
    net(inputs_of(0, 0, rank), whole=True).square().sum().backward()
    seen["at_the_end_of_backward"] = len(started)
    exchange.finish()
    torch.distributed.all_reduce = real
    seen["in_all"] = len(started)
    seen["last_layers"] = net.last.bias.grad.clone()
    return seen


def exchange_on_ranks(cases: dict[str, dict[str, Any]], world_size: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank of `world_size` real processes found in each case, by rank."""
    run_on(world_size, folder, run_cases, cases, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def run_cases(cases: dict[str, dict[str, Any]], folder: Path) -> None:
    """What each rank does."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    kinds = {"gradients": run_case, "training": train_case, "early": early_case}
    found = {name: kinds[case["kind"]](case, rank, world_size) for name, case in cases.items()}
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
