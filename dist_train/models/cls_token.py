"""A copy of the [CLS] of tokens, whose gradient is added to its own row."""

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


def take_cls(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, S, D), for a transformer block to go on with, and their [CLS], (B, D), a copy.

    A view of the [CLS] would keep all tokens of every block in memory.
    """
    if torch.compiler.is_compiling():  # which fuses the plain form's zeros and sum into what follows
        return tokens, tokens[:, 0].clone()
    return _TakeCLS.apply(tokens)
