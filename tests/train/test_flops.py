"""The FLOPs behind MFU are those that a step has: of what is trained, and of nothing that is computed twice."""

import pytest
import torch

from dist_train.config import ModelConfig
from dist_train.models.build import build_model
from dist_train.parse import parse_recipe
from dist_train.place import Place
from dist_train.train.meters import data_sheet_peak, training_flops_per_sample
from dist_train.train.setup import build_step

SIDE, CLASSES, DIM, DEPTH, TOKENS = 64, 11, 192, 12, 1 + 16
BLOCK = 2 * 12 * TOKENS * DIM**2 + 4 * TOKENS**2 * DIM  # products of one block in the forward pass
EMBEDDING = 2 * 16 * DIM * 3 * 16**2
CLASSIFIER = 2 * DIM * CLASSES
FORWARD = DEPTH * BLOCK + EMBEDDING + CLASSIFIER


def flops_of(**model: object) -> int:
    network, _ = build_model(ModelConfig(backbone="vit_tiny_patch16", **model), SIDE, CLASSES)  # type: ignore[arg-type]
    return training_flops_per_sample(network, torch.randn(1, 3, SIDE, SIDE))


def test_what_is_trained_has_two_products_behind_one_of_the_forward_pass_but_the_lowest() -> None:
    # Nothing is propagated to the pixels.
    assert flops_of() == FORWARD + 2 * (DEPTH * BLOCK + CLASSIFIER) + EMBEDDING


@pytest.mark.parametrize("frozen", [1, 6, 11])
def test_nothing_is_propagated_below_the_lowest_block_that_is_trained(frozen: int) -> None:
    assert flops_of(freeze=str(frozen)) == FORWARD + 2 * ((DEPTH - frozen) * BLOCK + CLASSIFIER)


def test_a_head_on_a_frozen_backbone_adds_its_own_gradient_alone() -> None:
    assert flops_of(freeze="backbone") == FORWARD + CLASSIFIER


def test_a_frozen_weight_beside_adapters_has_no_gradient() -> None:
    rank = 4
    frozen = 2 * TOKENS * DIM**2 * 12  # products of a block's weights: queries, keys and values 3, projection 1, MLP 8
    attention = 4 * TOKENS**2 * DIM
    adapters = 2 * TOKENS * rank * DIM * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1))
    forward = FORWARD + DEPTH * adapters
    backward = DEPTH * (frozen + 2 * attention + 2 * adapters) + 2 * CLASSIFIER
    # The lowest layer with adapters propagates nothing further down, through its weight or through them.
    to_the_embedding = 2 * TOKENS * 3 * DIM**2 + 2 * TOKENS * rank * DIM
    assert flops_of(lora=rank) == forward + backward - to_the_embedding


def test_the_weights_are_neither_read_nor_changed_nor_moved() -> None:
    """Nor has the count anything to do with autocast, in which features for a cache have been computed before it."""
    network, _ = build_model(ModelConfig(backbone="vit_tiny_patch16"), SIDE, CLASSES)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.autocast = torch.bfloat16
    assert training_flops_per_sample(network, torch.full((1, 3, SIDE, SIDE), torch.nan)) == flops_of()
    assert network.training and all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network(torch.randn(2, 3, SIDE, SIDE)).isfinite().all()


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16", "vit_tiny_patch16_224", "convnext_atto"])
def test_what_is_computed_again_is_not_counted(backbone: str) -> None:
    counted = []
    for again in ("false", "true"):
        asked = {"backbone": backbone, "checkpoint_blocks": again, "head": "cls"}
        recipe, _ = parse_recipe(["--config", "demo", *(f"--model.{key}={value}" for key, value in asked.items())])
        model, _ = build_model(recipe.model, recipe.data.image_size, CLASSES)
        counted.append(build_step(model, recipe, Place(), [1] * CLASSES).meter.flops_per_sample)
        assert any(getattr(module, "grad_checkpointing", False) for module in model.modules()) is (again == "true")
    assert counted[0] == counted[1]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        *((other, None) for other in ("NVIDIA A10G", "NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA T400 4GB")),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_a_data_sheet_counts_for_the_gpu_that_it_is_of(name: str, peak: float | None) -> None:
    assert data_sheet_peak(name) == peak
