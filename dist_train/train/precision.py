"""In what arithmetic a model runs: what the recipe asks for, and what its matrix products really were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dist_train.config import DeepSpeedConfig
from dist_train.errors import WorkError
from dist_train.models.backbones import TokenTransformer
from dist_train.models.build import Classifier
from dist_train.train.settings import precision_of, uses_autocast

_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16_autocast": torch.bfloat16,
    "fp16": torch.float16,
}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "float64"}
_LEAST_SHARE = 0.99  # of the matrix products' FLOPs in the recipe's precision


def compute_dtype(config: DeepSpeedConfig) -> torch.dtype:
    """The type of what matrix products read."""
    return _DTYPES[precision_of(config)]


def set_arithmetic(model: Classifier, config: DeepSpeedConfig) -> None:
    """Make the model, and this process's float32 matrix products, compute as the recipe says."""
    precision = precision_of(config)
    model.autocast = torch.bfloat16 if uses_autocast(config) else None
    if isinstance(model.backbone, TokenTransformer):
        model.backbone.token_dtype = torch.bfloat16 if precision == "bf16" and model.autocast else None
    # cuDNN's convolutions take TF32 by default.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


class MatrixProducts(TorchDispatchMode):
    """While this lasts, counts the FLOPs of matrix products, convolutions and attention by what they read.

    Counted as torch.utils.flop_counter does, 2 per multiply-add; in the backward pass too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            # The second is a factor in all of them: addmm's first is the bias, attention's last are the float32 sums of
            # its softmax and the integer state of its random numbers.
            read = [value for value in args if isinstance(value, Tensor)][1]
            self.flops[self._name(read)] += count(*args, **(kwargs or {}), out_val=out)
        return out

    @staticmethod
    def _name(tensor: Tensor) -> str:
        if tensor.dtype == torch.float32 and tensor.is_cuda and torch.backends.cuda.matmul.allow_tf32:
            return "tf32"
        return _NAMES.get(tensor.dtype, str(tensor.dtype))

    def shares(self) -> dict[str, float]:
        """Share of the FLOPs by precision, the largest first."""
        total = sum(self.flops.values())
        return {name: flops / total for name, flops in self.flops.most_common()}


@contextmanager
def measured_products() -> Iterator[MatrixProducts]:
    """Counts matrix products within, where compiled code runs as PyTorch's operators so that they can be seen."""
    with torch.compiler.set_stance("force_eager"), MatrixProducts() as products:
        yield products


def check_products(config: DeepSpeedConfig, products: MatrixProducts) -> str:
    """What the matrix products of one forward and backward pass were computed in, in words.

    Raises WorkError where that is not what the recipe says.
    """
    wanted, shares = precision_of(config).removesuffix("_autocast"), products.shares()
    words = ", ".join(f"{name} in {100 * share:.3g} %" for name, share in shares.items()) + " of matrix products"
    if shares.get(wanted, 0.0) < _LEAST_SHARE:
        raise WorkError(
            f"deepspeed.precision is {config.precision}, but what ran is {words}: an installed version of DeepSpeed or "
            "torch does otherwise than this trainer expects; set deepspeed.precision to what ran, or another version"
        )
    return words
