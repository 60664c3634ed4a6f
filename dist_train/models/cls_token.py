"""What heads take of the tokens between the blocks, with gradients that are added to the tokens' own in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _TakeCLS(torch.autograd.Function):
    """Tokens (B, S, D) to the same tokens and a copy of their [CLS], (B, D).

    A plain `tokens[:, 0]` would make its gradient a tensor of zeros of all tokens and add that to the gradient of the
    tokens, for every block. Here the [CLS]'s gradient is added to its own row.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape = tokens.shape
        return tokens.view_as(tokens), tokens[:, 0].clone()

    @staticmethod
    def backward(ctx: Any, of_tokens: Tensor | None, of_cls: Tensor | None) -> Tensor | None:
        if of_cls is None:
            return of_tokens
        if of_tokens is None:  # nothing reads the tokens of the last block but the head
            of_tokens = of_cls.new_zeros(ctx.shape)
        # In place is safe: the tokens have two readers, a block's residual and its norm, and the sum of their two
        # gradients is a tensor that nothing else holds.
        of_tokens[:, 0] += of_cls
        return of_tokens


class _TakeCLSAndAverage(torch.autograd.Function):
    """Tokens (B, S, D) to the same tokens and their [CLS] beside the average of some of them, (B, 2 D).

    The plain form's gradient would make four tensors of all tokens for every block. Here it is one pass over them.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.patches, ctx.count = tokens.shape, slice(first, first + count), count
        return tokens.view_as(tokens), _cls_and_average(tokens, first, count)

    @staticmethod
    def backward(ctx: Any, of_tokens: Tensor | None, of_taken: Tensor | None) -> tuple[Tensor | None, None, None]:
        if of_taken is None:
            return of_tokens, None, None
        of_cls, of_average = of_taken.chunk(2, dim=1)
        if of_tokens is None:
            of_tokens = of_taken.new_zeros(ctx.shape)
        of_tokens[:, 0] += of_cls  # in place as above
        of_tokens[:, ctx.patches] += (of_average / ctx.count)[:, None]
        return of_tokens, None, None


def _cls_and_average(tokens: Tensor, first: int, count: int) -> Tensor:
    return torch.cat([tokens[:, 0], tokens[:, first : first + count].mean(dim=1)], dim=1)


def take_cls(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, S, D), for a transformer block to go on with, and their [CLS], (B, D), a copy.

    A view of the [CLS] would keep all tokens of every block in memory.
    """
    if torch.compiler.is_compiling():  # which fuses the plain form's zeros and sum into what follows
        return tokens, tokens[:, 0].clone()
    return _TakeCLS.apply(tokens)


def take_cls_and_average(tokens: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """As `take_cls`, with the [CLS] and behind it the average of the `count` tokens from `first` on, (B, 2 D)."""
    if torch.compiler.is_compiling():
        return tokens, _cls_and_average(tokens, first, count)
    return _TakeCLSAndAverage.apply(tokens, first, count)
