"""The heads: the IFA formula, the start of the classifiers, and what the IFA head costs in memory."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train.config import ModelConfig
from dist_train.models.build import Classifier, build_model
from dist_train.models.heads import IFAHead, initialise_head

DIM, DEPTH = 192, 12  # of vit_tiny


def build(head: str, text_tokens: int = 0, patch: int = 8, **settings: Any) -> Classifier:
    config = ModelConfig(backbone=f"vit_tiny_patch{patch}", head=head, text_tokens=text_tokens, **settings)  # type: ignore[arg-type]
    return build_model(config, image_size=64, num_classes=5, vocab_size=50)[0]


def inputs(model: Classifier, batch: int) -> tuple[Tensor, ...]:
    images = torch.randn(batch, 3, 64, 64)
    if model.text is None:
        return (images,)
    tokens = model.text.position.num_embeddings
    return images, torch.randint(1, 50, (batch, tokens)), torch.arange(tokens).expand(batch, -1) < tokens - 2


def every_blocks_output(model: Classifier, *batch: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens after each block, stacked to (B, S, D, L) as the paper's code does, and the logits."""
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: outputs.append(call[2])) for block in model.backbone.blocks]
    logits = model(*batch)
    for hook in hooks:
        hook.remove()
    return torch.stack(outputs, dim=-1), logits


def ifa_as_defined(head: IFAHead, stacked: Tensor) -> Tensor:
    """The head's definition written out in elementary operations, on (B, S, D, L)."""
    cls_tokens = stacked[:, 0]
    mixture = (cls_tokens * head.aggregate.weight[0]).sum(dim=-1) + head.aggregate.bias
    mixture = mixture.clamp(min=0)
    mean = mixture.mean(dim=-1, keepdim=True)
    variance = ((mixture - mean) ** 2).mean(dim=-1, keepdim=True)
    normalised = (mixture - mean) / (variance + head.norm.eps).sqrt() * head.norm.weight + head.norm.bias
    return normalised @ head.classifier.weight.T + head.classifier.bias


def test_the_ifa_head_is_the_formula() -> None:
    torch.manual_seed(0)
    head = IFAHead(dim=24, depth=5, num_classes=7, norm_eps=1e-6).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    stacked = torch.randn(4, 9, 24, 5, dtype=torch.float64)
    torch.testing.assert_close(head(stacked[:, 0]), ifa_as_defined(head, stacked), atol=1e-6, rtol=0)


@pytest.mark.parametrize("text_tokens", [0, 6])
def test_the_ifa_model_aggregates_the_unnormalised_cls_token_of_every_block(text_tokens: int) -> None:
    torch.manual_seed(0)
    model = build("ifa", text_tokens).eval()
    with torch.no_grad():
        stacked, logits = every_blocks_output(model, *inputs(model, batch=2))
        assert stacked.shape == (2, 1 + 64 + text_tokens, DIM, DEPTH)
        torch.testing.assert_close(logits, ifa_as_defined(model.head, stacked), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("head", "head_init", "zero"),
    [
        ("cls", "reference", True),
        ("ifa", "reference", False),
        ("cls", "zero", True),
        ("ifa", "zero", True),
        ("cls", "default", False),
        ("ifa", "default", False),
    ],
)
def test_the_classifier_starts_as_head_init_says(head: str, head_init: str, zero: bool) -> None:
    torch.manual_seed(0)
    model = build(head, head_init=head_init)
    assert (model(torch.randn(1, 3, 64, 64)).abs().max() == 0) == zero
    for parameter in model.head.classifier.parameters():
        assert (parameter.abs().max() == 0) == zero
        # PyTorch's default for a linear layer: uniform in +-1/sqrt(inputs), so about 0.58/sqrt(inputs) in deviation
        assert parameter.abs().max() <= DIM**-0.5
    if head == "ifa":
        assert 0 < model.head.aggregate.weight.abs().max() <= DEPTH**-0.5


class TensorWatch(TorchDispatchMode):
    """Sees the result of every operation: the largest tensor, and the highest total of memory held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.operations = 0
        self.held = 0
        self.peak = 0
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(self, operation: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.storages:
            size = storage.nbytes()
            self.held += size
            self.peak = max(self.peak, self.held)
            self.storages[key] = weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.held -= size
        del self.storages[key]


@pytest.mark.parametrize("text_tokens", [0, 6])
def test_no_tensor_of_all_tokens_of_all_blocks_is_ever_made(text_tokens: int) -> None:
    torch.manual_seed(0)
    model = build("ifa", text_tokens)
    batch = inputs(model, batch=2)
    all_tokens_of_all_blocks = 2 * (1 + 64 + text_tokens) * DIM * DEPTH
    with TensorWatch() as forward:
        loss = model(*batch).square().sum()
    with TensorWatch() as backward:
        loss.backward()
    assert forward.operations > 100 and backward.operations > 100
    assert forward.largest < all_tokens_of_all_blocks
    assert backward.largest < all_tokens_of_all_blocks


def test_the_watch_sees_such_a_tensor_where_the_papers_code_makes_it() -> None:
    torch.manual_seed(0)
    model = build("ifa")
    (images,) = inputs(model, batch=2)
    with TensorWatch() as forward:
        stacked, _ = every_blocks_output(model, images)
        loss = model.head(stacked[:, 0]).square().sum()
    with TensorWatch() as backward:
        loss.backward()
    assert forward.largest >= 2 * 65 * DIM * DEPTH
    assert backward.largest >= 2 * 65 * DIM * DEPTH


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_ifa_needs_at_most_three_times_its_cls_tokens_more_memory_than_cls(mode: str) -> None:
    peaks = {}
    for head in ("cls", "ifa"):
        torch.manual_seed(0)
        model = build(head)
        images = torch.randn(4, 3, 64, 64)
        for parameter in model.parameters():  # so that gradients are added to memory that is there already
            parameter.grad = torch.zeros_like(parameter)
        with torch.set_grad_enabled(mode == "train"), TensorWatch() as watch:
            loss = model(images).square().sum()
            if mode == "train":
                loss.backward()
        peaks[head] = watch.peak
    cls_tokens = 4 * DIM * DEPTH * 4
    assert 0 < peaks["ifa"] - peaks["cls"] <= 3 * cls_tokens


class TokenSized(TorchDispatchMode):
    """Counts operators that make a tensor of at least `numel` numbers of their own, not a view, while it lasts."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made = numel, 0

    def __torch_dispatch__(self, operation: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.numel:
                self.made += tensor.untyped_storage().data_ptr() not in known
        return result


@pytest.mark.parametrize("settings", [{}, {"drop_path": 0.3}, {"checkpoint_blocks": True}, {"freeze": "3"}])
@pytest.mark.parametrize("text_tokens", [0, 6])
def test_the_gradient_of_a_cls_token_makes_no_tensor_of_all_tokens(settings: dict[str, Any], text_tokens: int) -> None:
    """A backward pass of IFA makes as many of that size as one of CLS; `tokens[:, 0]` makes two a block more."""
    made = {}
    for head in ("cls", "ifa"):
        torch.manual_seed(0)
        model = build(head, text_tokens, head_init="mean", **settings)
        loss = model(*inputs(model, batch=2)).square().sum()
        with TokenSized(2 * (1 + 64 + text_tokens) * DIM) as watch:
            loss.backward()
        made[head] = watch.made
    assert made["ifa"] == made["cls"] > DEPTH - 3


@pytest.mark.parametrize("settings", [{}, {"drop_path": 0.3}, {"checkpoint_blocks": True}, {"freeze": "3"}])
@pytest.mark.parametrize("text_tokens", [0, 6])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_papers_way(settings: dict[str, Any], text_tokens: int, compiled: bool) -> None:
    """In float64, against all tokens of all blocks stacked before token 0 is taken."""
    torch.manual_seed(0)
    model = build("ifa", text_tokens, head_init="mean", **settings).double()
    images, *text = inputs(model, batch=2)
    batch = (images.double().requires_grad_(), *text)

    def gradients(logits: Tensor) -> list[Tensor]:
        return torch.autograd.grad(
            logits.square().sum(), [batch[0], *filter(lambda p: p.requires_grad, model.parameters())]
        )

    torch.manual_seed(1)  # for drop path
    stacked, _ = every_blocks_output(model, *batch)
    expected = gradients(model.head(stacked[:, 0]))
    if compiled:
        if settings:
            return
        model.backbone.compile(backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    for found, exact in zip(gradients(model(*batch)), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_the_mean_start_aggregates_the_blocks_by_their_mean() -> None:
    head = IFAHead(dim=6, depth=4, num_classes=3, norm_eps=1e-6)
    initialise_head(head, "mean")
    features = torch.randn(5, 6, 4)
    torch.testing.assert_close(head.aggregate(features).squeeze(-1), features.mean(dim=-1))
    assert head.classifier.weight.abs().sum() > 0


def test_the_last_start_aggregates_the_last_block_alone() -> None:
    head = IFAHead(dim=6, depth=4, num_classes=3, norm_eps=1e-6)
    initialise_head(head, "last")
    features = torch.randn(5, 6, 4)
    assert torch.equal(head.aggregate(features).squeeze(-1), features[:, :, -1])
    assert head.classifier.weight.abs().sum() > 0
