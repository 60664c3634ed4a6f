"""Any model of timm as a backbone, found by what it can do and not by a list of families.

A model is built once without memory (torch's meta device) and looked at: whether its `blocks` hand on tokens (B, S, D),
whether it has a [CLS] token, whether its blocks take text tokens and a mask, which parameters nothing depends on. What
is a sequence of tokens then gives every block's features (`heads.Features`) by hooks on its blocks; everything gives
the features that timm pools. The model's own forward runs in any case: ZeRO 3 gathers a module's own parameters (a
[CLS] token, position embeddings) when that is called.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from timm.layers import DropPath
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from dist_train.errors import UseError
from dist_train.models.abilities import Abilities, check_patches
from dist_train.models.cls_token import take_cls, take_cls_and_average
from dist_train.models.heads import Features

_KEY_OF = {"drop_path_rate": "model.drop_path", "proj_drop_rate": "model.dropout"}
_TEXT = 3  # tokens of the text that a model is tried with


@dataclass(frozen=True)
class Traits:
    """What was seen of a timm model at an image size."""

    can: Abilities
    pooled_dim: int
    """Channels of what it pools."""
    token_dim: int
    """Channels of a token; 0: no sequence of tokens."""
    depth: int
    """Blocks of the sequence."""
    parameters: int
    """Numbers that it has, without a classifier."""
    idle: dict[Features, frozenset[str]]
    """Parameters on which nothing depends that the head is given, by what that is: not to be trained, as ZeRO waits for
    a gradient of all that are."""


# ---------------------------------------------------------------- building
def timm_arguments(backbone: str, image_size: int) -> dict[str, int]:
    """What `timm.create_model` needs beside the name to take images of that size: img_size, or nothing."""
    return {"img_size": image_size} if _has_fixed_size(backbone) else {}


@cache
def _has_fixed_size(backbone: str) -> bool:
    described = timm.get_pretrained_cfg(backbone)
    if described is not None:
        return bool(described.fixed_input_size)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return bool(timm.create_model(backbone).pretrained_cfg.get("fixed_input_size", False))


def create(backbone: str, image_size: int, drop_path: float = 0.0, dropout: float = 0.0) -> nn.Module:
    """timm's model of that name, for images of that size, untrained, without a classifier. Raises UseError where it
    cannot be.

    A rate of 0 is none: some of timm's models, such as Swin, begin with one of their own.
    """
    arguments: dict[str, Any] = timm_arguments(backbone, image_size)
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    if dropout:
        arguments |= {"pos_drop_rate": dropout, "proj_drop_rate": dropout}
    while True:
        try:
            model = timm.create_model(backbone, num_classes=0, **arguments)
            break
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in arguments:
                raise
            if unknown[1] in _KEY_OF:
                raise UseError(f"{_KEY_OF[unknown[1]]}: timm's {backbone} has none; use 0") from None
            del arguments[unknown[1]]
        except (AssertionError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise _wrong_size(backbone, image_size, error) from None
    for module in model.modules():
        if isinstance(module, DropPath) and not drop_path:
            module.drop_prob = 0.0
        elif isinstance(module, _DropoutNd) and not dropout:
            module.p = 0.0
    if not dropout and hasattr(model, "drop_rate"):  # before the classifier, in the forward pass of some
        model.drop_rate = 0.0
    return model


def _wrong_size(backbone: str, image_size: int, error: Exception) -> UseError:
    own = timm.get_pretrained_cfg(backbone)
    usual = f"; {own.input_size[-1]} is the size of its pretrained weights" if own else ""
    why = " ".join(str(error).split())[:120] or type(error).__name__
    return UseError(f"data.image_size: {backbone} does not take images of {image_size} pixels ({why}){usual}")


def build_timm(
    backbone: str, image_size: int, features: Features, drop_path: float = 0.0, dropout: float = 0.0, text: bool = False
) -> nn.Module:
    """The backbone of that timm name: images (B, 3, H, W), and (if `text`) embedded text tokens (B, T, D) and a mask as
    in `backbones.TokenTransformer`, to what `features` says. Its parameters have timm's names; those that nothing
    depends on are not trained.
    """
    model = create(backbone, image_size, drop_path, dropout)
    if text or features != "pooled":
        model.token_reader = TokenReader(model, features)  # type: ignore[assignment]  # no module: it is not registered
    idle = inspect(backbone, image_size).idle[features]
    for name, parameter in model.named_parameters():
        if name in idle:
            parameter.requires_grad_(False)
    return model


class TokenReader:
    """Hooks on a timm model that is a sequence of tokens: it takes text tokens and a mask behind the images, which join
    the image's tokens before the first block and leave them behind the last, and gives what `features` says.

    Everything is a function of the call's arguments; what is kept here lasts from the model's begin to its end, or
    until the next begin where blocks are computed again in the backward pass.
    """

    def __init__(self, model: nn.Module, features: Features) -> None:
        self._features = features
        self._prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
        self._tokens = self._prefix + int(model.patch_embed.num_patches)  # type: ignore[union-attr,arg-type]
        self._text: Tensor | None = None
        self._mask: Tensor | None = None
        self._per_block: list[Tensor] | None = None
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)
        self._blocks: list[nn.Module] = list(model.blocks)  # type: ignore[arg-type]
        self._blocks[0].register_forward_pre_hook(self._join)
        for block in self._blocks:
            block.register_forward_pre_hook(self._give_mask, with_kwargs=True)
        self._behind: list[RemovableHandle] = []
        self.go_last()

    def go_last(self) -> None:
        """Let what is done to a block's output come behind the hooks that others have put on the block since.

        ZeRO 3 gathers a block's own parameters for its backward pass when the gradient reaches what its hook has given
        on; the gradient of a [CLS] taken before would pass it by.
        """
        for handle in self._behind:
            handle.remove()
        self._behind = [block.register_forward_hook(self._collect) for block in self._blocks]
        self._behind.append(self._blocks[-1].register_forward_hook(self._part))

    def _begin(self, model: nn.Module, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        images, self._text, self._mask = (*inputs, None, None)[:3]
        self._per_block = []
        return (images,)

    def _end(self, model: nn.Module, inputs: tuple[Tensor, ...], pooled: Tensor) -> Tensor:
        per_block, self._per_block = self._per_block, None
        if not getattr(model, "grad_checkpointing", False):
            self._text = self._mask = None
        return pooled if self._features == "pooled" or per_block is None else torch.stack(per_block, dim=-1)

    def _join(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._text is None:
            return inputs
        return (torch.cat([inputs[0], self._text.to(inputs[0].dtype)], dim=1), *inputs[1:])

    def _give_mask(
        self, block: nn.Module, inputs: tuple[Tensor, ...], arguments: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return inputs, arguments if self._mask is None else {**arguments, "attn_mask": self._mask}

    def _collect(self, block: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        if self._features == "pooled":
            return tokens
        if self._features == "cls":
            tokens, taken = take_cls(tokens)
        else:
            tokens, taken = take_cls_and_average(tokens, self._prefix, self._tokens - self._prefix)
        # None: this is the second time, in the backward pass; the same operators, for what they keep.
        if self._per_block is not None:
            self._per_block.append(taken)
        return tokens

    def _part(self, block: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        return tokens if self._text is None else tokens[:, : self._tokens]


# ---------------------------------------------------------------- looking at one
@cache
def inspect(backbone: str, image_size: int) -> Traits:
    """What timm's model of that name can do with images of that size, found by building it without memory, in a
    fraction of a second; no random number is drawn. Raises UseError for a size that it does not take."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = create(backbone, image_size).train()
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
        side = patch[0] if isinstance(patch, tuple | list) else patch
        if isinstance(side, int):
            check_patches(backbone, side, image_size)
        blocks = getattr(model, "blocks", None)
        sequence = list(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else []
        seen: list[tuple[Any, Any]] = []
        hooks = [
            block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[:1], output)))
            for block in sequence
        ]
        images = torch.zeros(2, 3, image_size, image_size)
        try:
            pooled = model(images)
        except Exception as error:  # whatever its layers say of such a size
            raise _wrong_size(backbone, image_size, error) from None
        for hook in hooks:
            hook.remove()
        if not isinstance(pooled, Tensor) or pooled.ndim != 2:
            raise UseError(f"model.backbone: timm's {backbone} gives no pooled features (batch, channels)")
        prefix, patches = getattr(model, "num_prefix_tokens", None), _patches(model)
        is_sequence = isinstance(prefix, int) and _are_tokens(seen, len(sequence), patches + prefix)
        tokens = [output for _, output in seen] if is_sequence else []
        has_cls = is_sequence and isinstance(getattr(model, "cls_token", None), nn.Parameter)
        idle: dict[Features, frozenset[str]] = {"pooled": _idle(model, [pooled])}
        if tokens:
            idle["cls"] = idle["cls_and_average"] = _idle(model, tokens)
        names = [name for name, _ in model.named_parameters()]
        can = Abilities(
            tokens=is_sequence,
            per_block=has_cls,
            text=bool(tokens) and _takes_text(model, images, tokens[0]),
            batch_norms=any(isinstance(module, _BatchNorm) for module in model.modules()),
            recomputes=hasattr(model, "set_grad_checkpointing"),
            layers=layers_by_timm(model, names)[1] - 1,
        )
        parameters = sum(parameter.numel() for parameter in model.parameters())
        dim = tokens[0].shape[2] if tokens else 0
        return Traits(can, pooled.shape[1], dim, len(tokens), parameters, idle)


def _patches(model: nn.Module) -> int:
    count = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
    return count if isinstance(count, int) else 0


def _are_tokens(seen: list[tuple[Any, Any]], blocks: int, length: int) -> bool:
    """Whether each block, once and in turn, took and gave tokens (B, length, D) of one shape."""
    shapes = {
        tuple(value.shape) if isinstance(value, Tensor) else ()
        for inputs, output in seen
        for value in (*inputs, output)
    }
    return len(seen) == blocks > 0 and len(shapes) == 1 and all(len(s) == 3 and s[1] == length for s in shapes)


def _idle(model: nn.Module, results: list[Tensor]) -> frozenset[str]:
    """The parameters on which none of the results depends: those that their graph does not reach."""
    nodes = [result.grad_fn for result in results]
    known = set(nodes)
    reached = set()
    while nodes:
        node = nodes.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            reached.add(id(leaf))
        following = {following for following, _ in getattr(node, "next_functions", ())} - known - {None}
        known |= following
        nodes.extend(following)
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) not in reached)


def _takes_text(model: nn.Module, images: Tensor, tokens: Tensor) -> bool:
    """Whether the model goes with text tokens and a mask; hooks stay on it."""
    TokenReader(model, "pooled")
    text = torch.zeros(2, _TEXT, tokens.shape[2])
    mask = torch.ones(2, 1, 1, tokens.shape[1] + _TEXT, dtype=torch.bool)
    try:
        model(images, text, mask)
    except Exception:  # rotary or relative positions that are made for the image alone, or no mask
        return False
    return True


# ---------------------------------------------------------------- layers
def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """What timm calls the model's classifier, or its several, as DeiT's distilled ones have."""
    names = getattr(model, "default_cfg", {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def layers_by_timm(model: nn.Module, names: list[str]) -> tuple[dict[str, int], int]:
    """The layer of each parameter by timm's own group matcher, from 0 for the stem, and that of the classifier."""
    classifier = f"{classifier_names(model)[0]}.weight"
    if not hasattr(model, "group_matcher"):
        return dict.fromkeys(names, 0), 1
    matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
    layers = group_with_matcher(((name, None) for name in [*names, classifier]), matcher, reverse=True)
    return layers, layers[classifier]
