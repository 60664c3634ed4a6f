"""Sharpness over many directions and the Hessian's eigenvalue, of losses for which both are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.claims.sharpness import (
    excess_losses,
    hessian_eigenvalue,
    largest_eigenvalue,
    mean_excess,
)
from dist_train.config import ModelConfig
from dist_train.data.loader import Batch
from dist_train.models.build import build_model
from tests.harness import CLASSES


class Bowl(nn.Module):
    """A loss of sample s of curvature[s] / 2 |w - w0|^2, w0 the weights that it starts with."""

    def __init__(self, curvature: list[float]) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.start = self.linear.weight.detach().clone()
        self.curvature = np.array(curvature)

    def losses(self) -> np.ndarray:
        squared = (self.linear.weight.detach() - self.start).double().square().sum().item()
        return 7 + self.curvature / 2 * squared


def test_the_excess_over_directions_of_a_bowl_is_its_mean_over_a_disc() -> None:
    bowl = Bowl([1.0, 3.0, 8.0])
    before = bowl.linear.weight.detach().clone()
    excess = excess_losses(bowl, bowl.losses, seed=1, directions=4, radius=0.6)
    assert excess.shape == (4, 3)
    # Filter-normalised, every direction is as long as the weights; the mean of a^2 + b^2 over a disc is r^2 / 2.
    expected = bowl.curvature / 2 * before.double().square().sum().item() * 0.6**2 / 2
    np.testing.assert_allclose(excess, np.tile(expected, (4, 1)), rtol=1e-4)
    assert torch.equal(bowl.linear.weight, before)


def test_directions_are_others_and_move_what_is_trained_alone() -> None:
    model, _ = build_model(ModelConfig("vit_tiny_patch16", head_init="default", freeze="11"), 32, CLASSES)
    weights = {name: its.detach().clone() for name, its in model.named_parameters()}
    seen: list[dict[str, Tensor]] = []

    def losses() -> np.ndarray:
        seen.append({name: its.detach() - weights[name] for name, its in model.named_parameters()})
        return np.zeros(1)

    excess_losses(model, losses, seed=0, directions=2, radius=1.0)
    assert len(seen) == 9  # the centre, and two radii and senses of each direction
    trained = {name for name, its in model.named_parameters() if its.requires_grad and its.ndim > 1}
    for moved in seen[1:]:
        assert {name for name, by in moved.items() if by.any()} == trained
    name = "backbone.blocks.11.mlp.fc1.weight"
    one, other = (seen[i][name].flatten() for i in (1, 5))
    assert abs(functional.cosine_similarity(one, other, dim=0).item()) < 0.05
    torch.testing.assert_close(seen[2][name], -seen[1][name], rtol=0, atol=1e-6)


def test_the_errors_are_students_over_directions_and_over_samples() -> None:
    excess = np.array([[1.0, 2.0, 6.0, 3.0], [2.0, 2.0, 8.0, 4.0], [3.0, 5.0, 7.0, 5.0]])
    found = mean_excess(excess)
    assert found["expected_excess_loss"] == pytest.approx(4.0)
    directions, samples = excess.mean(1), excess.mean(0)
    # Of Student's t: 4.302653 at two degrees of freedom, 3.182446 at three.
    assert found["expected_excess_loss_error_directions"] == pytest.approx(
        4.302653 * math.sqrt(directions.var(ddof=1) / 3)
    )
    assert found["expected_excess_loss_error_samples"] == pytest.approx(3.182446 * math.sqrt(samples.var(ddof=1) / 4))
    assert mean_excess(excess[:1])["expected_excess_loss_error_directions"] is None


@pytest.mark.parametrize(
    "values", [[9.0, 4.0, 1.0, -2.0], [1.0, -7.0, 3.0, 2.0], [5.0, -5.0, 1.0, 0.0], [-1.0, -2.0, -8.0, -3.0]]
)
def test_the_eigenvalue_of_a_quadratic_is_its_largest(values: list[float]) -> None:
    """Also where others are larger in magnitude, or as large."""
    generator = torch.Generator().manual_seed(3)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    hessian = turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.T
    slope = torch.randn(4, generator=generator, dtype=torch.float64)
    first, second = (nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64)) for _ in range(2))
    before = torch.cat([first, second]).detach().clone()

    def gradient() -> list[Tensor]:
        return list((hessian @ torch.cat([first, second]).detach() + slope).split(2))

    found = largest_eigenvalue([("first", first), ("second", second)], gradient, seed=0, tolerance=1e-6, most=500)
    assert found.value == pytest.approx(max(values), rel=1e-6)
    assert found.residual <= 1e-6 and found.steps < 40
    assert torch.equal(torch.cat([first, second]).detach(), before)
    cut_short = largest_eigenvalue([("first", first), ("second", second)], gradient, seed=0, most=1)
    assert cut_short.steps == 1 and cut_short.residual > 0.05  # and it says how far it is


def images_of(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    images, labels = torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % CLASSES
    one = slice(0, count - 2), slice(count - 2, count)
    return [
        Batch(images[part], labels[part], torch.ones(len(labels[part])), None, None, np.arange(count)[part])
        for part in one
    ]


def test_the_eigenvalue_of_a_linear_classifier_is_that_of_its_known_hessian() -> None:
    """H = mean of (diag(p) - p p^T) kron (f f^T) for softmax regression on features f, with 1 for the bias."""
    model, _ = build_model(ModelConfig("vit_tiny_patch16", head_init="default", freeze="backbone"), 32, CLASSES)
    model.eval()
    batches = images_of(6)
    state = {name: its.clone() for name, its in model.state_dict().items()}
    found = hessian_eigenvalue(model, batches, seed=0, most=300)
    after = model.state_dict()
    assert all(torch.equal(after[name], its) and after[name].dtype == its.dtype for name, its in state.items())
    images = torch.cat([batch.images for batch in batches])
    features: list[Tensor] = []
    (last,) = [one for one in model.head.modules() if isinstance(one, nn.Linear)]
    last.register_forward_hook(lambda module, inputs, output: features.append(inputs[0].detach()))
    with torch.no_grad():
        probabilities = model.double()(images.double()).softmax(1)
    inputs = torch.cat([features[0], torch.ones(6, 1, dtype=torch.float64)], dim=1)
    of_samples = [
        torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(f, f))
        for p, f in zip(probabilities, inputs, strict=True)
    ]
    hessian = torch.stack(of_samples).mean(dim=0)
    assert sum(its.numel() for its in model.parameters() if its.requires_grad) == len(hessian)
    assert found.value == pytest.approx(torch.linalg.eigvalsh(hessian).max().item(), rel=0.01)


def power_iteration(product: Callable[[Tensor], Tensor], size: int, steps: int) -> float:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(steps):
        vector = product(vector / vector.norm())
    return vector.norm().item()


def test_the_eigenvalue_of_a_transformer_is_that_of_its_gradients_derivative() -> None:
    """Beside products with the Hessian by differentiating twice, where attention can be."""
    torch.manual_seed(0)
    model, _ = build_model(ModelConfig("vit_tiny_patch16", head_init="default", freeze="11"), 32, CLASSES)
    model.eval()
    batches = images_of(4)
    found = hessian_eigenvalue(model, batches, seed=0, most=200)
    trained = [its for its in model.double().parameters() if its.requires_grad]
    images, labels = torch.cat([b.images for b in batches]).double(), torch.cat([b.labels for b in batches])
    with sdpa_kernel(SDPBackend.MATH):
        loss = functional.cross_entropy(model(images), labels)
        slopes = torch.cat([its.flatten() for its in torch.autograd.grad(loss, trained, create_graph=True)])

        def product(vector: Tensor) -> Tensor:
            parts = torch.autograd.grad(slopes, trained, vector, retain_graph=True)
            return torch.cat([part.flatten() for part in parts])

        magnitude = power_iteration(product, len(slopes), 50)
        largest = power_iteration(lambda vector: product(vector) + magnitude * vector, len(slopes), 300) - magnitude
    assert found.residual <= 0.01
    assert found.value == pytest.approx(largest, rel=0.02)
