"""Loss surfaces: directions, and the numbers of known surfaces, by independent computations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from benchmarks.claims import landscape
from benchmarks.claims.surface import (
    Floats,
    all_line_positions,
    draw_direction,
    gaussian,
    line_barrier,
    line_positions,
    move_on_plane,
    plane_points,
    sharpness,
    surface_arrays,
)
from dist_train.config import ModelConfig
from dist_train.models.build import build_model
from tests.harness import CLASSES


# ---------------------------------------------------------------------- directions
def test_every_filter_of_a_direction_has_the_norm_of_the_filter_and_nothing_else_moves() -> None:
    for config, vocabulary in (
        (ModelConfig("vit_tiny_patch16", "ifa", "default", text_tokens=4), 11),
        (ModelConfig("resnet18", head_init="default"), 0),
    ):
        model, _ = build_model(config, 32, CLASSES, vocabulary)
        drawn = draw_direction(model, seed=3, direction=1)
        weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
        still = ("cls_token", "pos_embed", "text.position.weight", "text.token_type.weight")
        assert set(drawn) == {n for n, w in weights.items() if w.ndim > 1 and not n.endswith(still)}
        for name, direction in drawn.items():
            mine, its = (
                np.sqrt(np.square(values.reshape(len(values), -1), dtype=np.float64).sum(axis=1))
                for values in (direction.numpy(), weights[name])
            )
            assert mine == pytest.approx(its, rel=1e-5)
        if vocabulary:
            assert not drawn["text.word.weight"][0].any()  # padding, whose embedding is 0


def test_models_with_other_heads_get_the_same_gaussian_for_what_they_share() -> None:
    model, other = (
        build_model(ModelConfig("vit_tiny_patch16", head, "default"), 32, CLASSES)[0] for head in ("cls", "ifa")
    )
    one, two = draw_direction(model, 5, 1), draw_direction(other, 5, 1)
    assert set(two) - set(one) == {"head.aggregate.weight"} and not set(one) - set(two)
    weights, others = dict(model.named_parameters()), dict(other.named_parameters())
    for name in one:
        # Both are the same raw numbers under their own models' filter norms.
        raw, same = (
            (drawn[name] / its[name].detach().flatten(1).norm(dim=1).view(-1, *[1] * (drawn[name].ndim - 1))).flatten(1)
            for drawn, its in ((one, weights), (two, others))
        )
        torch.testing.assert_close(raw, same, rtol=1e-4, atol=1e-6)
        reference = gaussian(5, 1, name, one[name].shape).flatten(1)
        torch.testing.assert_close(raw, reference / reference.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_gaussians_depend_on_seed_number_and_name_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    drawn = [gaussian(*key, (100, 100)) for key in ((0, 1, "a"), (0, 2, "a"), (1, 1, "a"), (0, 1, "b"))]
    assert (torch.random.get_rng_state() == before).all()
    assert (drawn[0] == gaussian(0, 1, "a", (100, 100))).all()
    for i, one in enumerate(drawn):
        assert abs(one.mean()) < 0.05 and abs(one.std() - 1) < 0.05
        assert all(abs((one * other).mean()) < 0.05 for other in drawn[:i])


def test_moving_on_the_plane_adds_both_directions_and_comes_back_exactly() -> None:
    model = torch.nn.Linear(3, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    one, other = (draw_direction(model, 0, number) for number in (1, 2))
    move = move_on_plane(model, one, other)
    move(0.5, -2.0)
    torch.testing.assert_close(model.weight.detach(), weight + 0.5 * one["weight"] - 2 * other["weight"])
    move(0.0, 0.0)
    assert (model.weight == weight).all() and (model.bias == bias).all()


# ---------------------------------------------------------------------- the numbers of a known surface
def test_the_sharpness_of_a_quadratic_is_its_closed_form() -> None:
    p, q, base, points, radius = 3.0, 5.0, 0.7, 41, 2.0

    def quadratic(a: float, b: float) -> tuple[float, float]:
        return base + (p * a * a + q * b * b) / 2, a

    plane = np.array([quadratic(a, b) for a, b in plane_points(points, radius)])
    arrays = surface_arrays(plane, np.empty((0, 2)), points, radius)
    for i, a in enumerate(arrays["a"]):
        for j, b in enumerate(arrays["b"]):
            assert arrays["loss"][i, j] == quadratic(a, b)[0] and arrays["top1"][i, j] == a
    assert arrays["a"][0] == -radius and arrays["a"][20] == 0 and arrays["b"][-1] == radius
    numbers = sharpness(plane, points, radius)
    assert numbers["curvature"] == pytest.approx((p + q) / 2, rel=1e-6)
    inside = [(a, b) for a in np.linspace(-2, 2, 41) for b in np.linspace(-2, 2, 41) if a * a + b * b <= 4 + 1e-6]
    assert numbers["mean_excess_loss"] == pytest.approx(np.mean([quadratic(*at)[0] - base for at in inside]))
    assert numbers["mean_excess_loss"] == pytest.approx((p + q) * radius**2 / 8, rel=0.03)  # the integral over a disc
    assert numbers["max_excess_loss_half_radius"] == pytest.approx(q * (radius / 2) ** 2 / 2)


def test_the_barrier_is_what_stands_above_the_straight_line_between_the_ends() -> None:
    def line(loss: Callable[[float], float], points: int) -> Floats:
        return np.array([(loss(t), 0.0) for t in all_line_positions(points)])

    bump = line(lambda t: 3 - 2 * t + 4 * t * (1 - t), 15)
    assert line_barrier(bump) == pytest.approx(1.0)  # at t = 1/2
    assert line_barrier(line(lambda t: 3 - 2 * t - t * (1 - t), 15)) == 0  # hangs through
    assert line_barrier(line(lambda t: 9.0 if t < -0.1 else 1.0, 15)) == 0  # beyond the ends does not count
    assert line_barrier(line(lambda t: 3 - 2 * t + 4 * t * (1 - t), 12)) < 1  # the ends are still 3 and 1
    assert line_barrier(np.empty((0, 2))) is None
    assert surface_arrays(np.zeros((5 + 9, 2)), bump, 3, 1)["line_loss"].tolist() == [
        pytest.approx(3 - 2 * t + 4 * t * (1 - t)) for t in line_positions(15)
    ]


def test_levels_are_log_spaced() -> None:
    levels = landscape.shared_levels(np.array([0.1, 3.0, 10.0]))
    assert levels[0] == pytest.approx(0.1) and levels[-1] == pytest.approx(10)
    assert np.allclose(np.diff(np.log(levels)), np.log(100) / (len(levels) - 1))
    assert (np.diff(landscape.shared_levels(np.zeros(4))) > 0).all()  # a flat surface has levels too
