"""The mean of the gradients over the ranks, exchanged while the backward pass still runs.

Gradients lie in flat buckets, in the reverse of the forward pass's order, about that in which they arrive. A full
bucket is sent at once, so that only the gradients of the last layers to be reached are left to send when the backward
pass ends. torch's DistributedDataParallel does the same, but orders its buckets anew after the first step of every
process; here a bucket holds the same gradients from the first step to the last, so that a resumed run, on three ranks
or more too, adds the same numbers in the same order as one that was never stopped.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_train.models.build import Classifier

# DDP's 25 leave most of a small model to the end: of 1 to 50, two to five were the fastest for ViT-S over a slow cable
# (`python -m benchmarks exchange --set buckets`). A ViT-B's or larger one's weights fill a bucket each in any case, so
# that the sends of large models do not become many and small.
BUCKET_MB = 5.0
# Where a gradient begins in its bucket, bytes: vectorised kernels take slower ways through what is not aligned.
_ALIGNMENT = 64


@dataclass
class _Bucket:
    """Gradients that are sent together: views into one flat tensor, which the collective takes."""

    flat: Tensor
    parameters: list[nn.Parameter]
    views: list[Tensor]
    missing: set[int] = field(default_factory=set)  # of the parameters, whose gradients have not arrived in this step
    streams: set[torch.cuda.Stream] = field(default_factory=set)  # on which they arrived, on a GPU


class GradientExchange:
    """Averages the gradients of the trainable ones of `parameters`, given in the order of the forward pass (see
    `forward_order`; any other costs time alone), over the ranks of the default process group.

    In each step: any number of backward passes, which add up in `.grad` on each rank; then `begin()`, the last backward
    pass, `finish()`, and every `.grad` is the mean over the ranks of what the rank's passes added up to. Gradients are
    cleared as usual, by `zero_grad` with set_to_none or without. All ranks need the same parameters in the same order,
    and the same number of steps. A parameter that a rank's passes did not reach counts as zeros there, and has a
    gradient afterwards, on every rank; what is to be sent after it waits for `finish`, so freeze what is never used.

    Build it once, when the parameters are on the device where they compute: the buckets take as much memory as the
    gradients, which then lie in them. Keep it as long as there are steps. What it does is done by hooks of the
    parameters, so it goes with any module and with compiled blocks; a model compiled as a whole yields all gradients at
    the end, and nothing is sent before.

    bucket_mb: the most that a bucket holds, 10^6 bytes; a larger parameter has one of its own.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world_size: int, bucket_mb: float = BUCKET_MB) -> None:
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        self._world_size = world_size
        self._buckets = [_make_bucket(group) for group in _group(trainable[::-1], bucket_mb * 1e6)]
        self._averages = torch.distributed.get_backend() == "nccl"  # gloo only adds
        self._running = False
        self._works: list[torch.distributed.Work] = []  # of the first buckets, one each
        # The parameters would otherwise keep the buckets, and those the parameters.
        this = weakref.ref(self)

        def hook_of(number: int, place: int) -> None:
            def arrived(_: Tensor) -> None:
                if (exchange := this()) is not None:
                    exchange._arrived(exchange._buckets[number], place)

            self._buckets[number].parameters[place].register_post_accumulate_grad_hook(arrived)

        for number, bucket in enumerate(self._buckets):
            for place in range(len(bucket.parameters)):
                hook_of(number, place)

    def begin(self) -> None:
        """The next backward pass is the last of the step."""
        for bucket in self._buckets:
            bucket.missing = set(range(len(bucket.parameters)))
        self._works.clear()
        self._running = True

    def finish(self) -> None:
        """After that pass: send what has not been sent, and wait. On a GPU the current stream waits, not the host."""
        if not self._running:
            raise RuntimeError("GradientExchange.finish needs begin before the backward pass")
        for bucket in self._buckets[len(self._works) :]:
            for place in bucket.missing:  # no gradient in this pass; perhaps in an earlier one of the step
                if bucket.parameters[place].grad is None:
                    bucket.parameters[place].grad = bucket.views[place].zero_()
            bucket.missing.clear()
        self._send_full_buckets()
        for work in self._works:
            work.wait()
        self._running = False

    def _arrived(self, bucket: _Bucket, place: int) -> None:
        """The gradient of a parameter has been added to its `.grad`."""
        if not self._running:
            if bucket.parameters[place].grad is not bucket.views[place]:
                # The next pass then adds to the bucket, and no gradient takes memory twice.
                bucket.parameters[place].grad = bucket.views[place].copy_(_gradient(bucket.parameters[place]))
            return
        if place not in bucket.missing:
            raise RuntimeError("two backward passes after one GradientExchange.begin: call finish after the first")
        bucket.missing.remove(place)
        if bucket.flat.is_cuda:
            bucket.streams.add(torch.cuda.current_stream(bucket.flat.device))
        if not bucket.missing:
            self._send_full_buckets()

    def _send_full_buckets(self) -> None:
        """Start exchanging, up to the first that is not full: all ranks must send in one order."""
        for bucket in self._buckets[len(self._works) :]:
            if bucket.missing:
                return
            if bucket.flat.is_cuda:
                _join_streams(bucket)
            gradients = [_gradient(parameter) for parameter in bucket.parameters]
            if self._averages:  # few launches, whatever the number of parameters
                torch._foreach_copy_(bucket.views, gradients)
            else:  # one pass over memory
                for gradient, view in zip(gradients, bucket.views, strict=True):
                    torch.div(gradient, self._world_size, out=view)
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                parameter.grad = view
            op = torch.distributed.ReduceOp.AVG if self._averages else torch.distributed.ReduceOp.SUM
            self._works.append(torch.distributed.all_reduce(bucket.flat, op, async_op=True))


def forward_order(model: Classifier) -> list[nn.Parameter]:
    """The model's parameters in about the order in which its forward pass reaches them."""
    # The text embeddings are registered behind the backbone; a ViLT reaches them before its blocks.
    text = [] if model.text is None else list(model.text.parameters())
    return [*text, *model.backbone.parameters(), *model.head.parameters()]


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # it has arrived
    return parameter.grad


def _join_streams(bucket: _Bucket) -> None:
    """Let the current stream wait for gradients that came on others.

    Hooks run on the stream of the forward pass; with compiled blocks DeepSpeed's were seen on several, and gradients
    were lost (its issue 8061).
    """
    current = torch.cuda.current_stream(bucket.flat.device)
    for stream in bucket.streams - {current}:
        current.wait_stream(stream)
        for parameter in bucket.parameters:
            _gradient(parameter).record_stream(current)  # or its memory could be given away before it is copied
    bucket.streams.clear()


def _group(parameters: list[nn.Parameter], limit: float) -> list[list[nn.Parameter]]:
    """Neighbours of one type and device, as many as have at most `limit` bytes; by the place of the last of each."""
    filling: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    groups = []
    for parameter in parameters:
        group = filling.setdefault((parameter.dtype, parameter.device), [])
        if group and sum(other.nbytes for other in group) + parameter.nbytes > limit:
            groups.append(group)
            group = filling[parameter.dtype, parameter.device] = []
        group.append(parameter)
    place = {parameter: number for number, parameter in enumerate(parameters)}
    return sorted([*groups, *filling.values()], key=lambda group: place[group[-1]])


def _make_bucket(parameters: list[nn.Parameter]) -> _Bucket:
    first = parameters[0]
    step = _ALIGNMENT // first.element_size()
    sizes = [-(-parameter.numel() // step) * step for parameter in parameters]
    flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    parts = flat.split(sizes)
    views = [part[: parameter.numel()].view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
    return _Bucket(flat, parameters, views)
