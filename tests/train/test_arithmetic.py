"""The precision of a recipe is what runs, on every ZeRO stage, whatever the engine around the model does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime import torch_autocast
from torch import Tensor, nn

from dist_train.cli import recipe_from_run
from dist_train.config import DeepSpeedConfig, Recipe
from dist_train.data.loader import Batch
from dist_train.errors import UseError, WorkError
from dist_train.models.build import build_model
from dist_train.models.names import VIT_SIZES
from dist_train.recipe import check_combination
from dist_train.train.engine import build_engine, init_process_group
from dist_train.train.losses import Objective
from dist_train.train.meters import StepMeter
from dist_train.train.precision import MatrixProducts, check_products, compute_dtype, precision_of
from dist_train.train.step import TrainStep, make_forward
from tests.harness import CLASSES, IFA, read_summary, train, write_shard_set
from tests.train.deepspeed_worker import NARROW, recipe_of

CPU = torch.device("cpu")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's engine asks whether CUDA's autocast is on, and if it is not its own, switches it off around the
    model. Here it is told of the CPU's."""

    class Torch(SimpleNamespace):
        autocast = torch.autocast

        @staticmethod
        def is_autocast_enabled() -> bool:
            return torch.is_autocast_enabled("cpu")

    monkeypatch.setattr(torch_autocast, "torch", Torch())


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VIT_SIZES, "tiny", NARROW)


def batch_of(recipe: Recipe, size: int = 4) -> Batch:
    tokens = recipe.model.text_tokens
    ids = torch.ones(size, tokens, dtype=torch.int64) if tokens else None
    mask = torch.ones(size, tokens, dtype=torch.bool) if tokens else None
    return Batch(
        torch.randn(size, 3, 32, 32),
        torch.arange(size) % CLASSES,
        torch.ones(size),
        ids,
        mask,
        torch.arange(size).numpy(),
    )


def one_step(recipe: Recipe) -> tuple[TrainStep, nn.Module]:
    """A training step through the engine that the recipe asks for."""
    place = init_process_group()
    model, _ = build_model(recipe.model, 32, CLASSES, 50 if recipe.model.text_tokens else 0)
    recipe.train.batch_size = 4
    engine = build_engine(model, recipe, place, 4)
    forward = make_forward(engine, recipe, CPU)
    objective = Objective(recipe.optim, [1] * CLASSES, CPU)
    step = TrainStep(engine, forward, objective, recipe, 1, 0, StepMeter(CPU, 1, 1))
    batches: Iterator[Batch] = repeat(batch_of(recipe))
    step(batches, 0.01, 0)
    return step, model


@pytest.mark.parametrize("precision", ["float32", "bf16", "bf16_autocast", "auto"])
@pytest.mark.parametrize("engine", ["ours", "deepspeed's", "zero 1", "zero 2", "zero 3"])
def test_all_matrix_products_are_in_the_recipes_precision(
    as_on_a_gpu: None, tmp_path: Path, precision: str, engine: str
) -> None:
    options = [f"--deepspeed.precision={precision}", "--model.head=ifa", "--model.text_tokens=4"]
    if engine == "deepspeed's":
        (tmp_path / "settings.json").write_text("{}")
        options.append(f"--deepspeed.config={tmp_path / 'settings.json'}")
    elif engine != "ours":
        if precision == "bf16_autocast":
            return  # refused, below
        options.append(f"--deepspeed.zero_stage={engine[-1]}")
    step, _ = one_step(recipe_of(Path(), options))
    name = {"auto": "float32", "bf16_autocast": "bf16"}.get(precision, precision)
    assert step.products == f"{name} in 100 % of matrix products"


@pytest.mark.parametrize(("precision", "tokens"), [("bf16", torch.bfloat16), ("bf16_autocast", torch.float32)])
@pytest.mark.parametrize("text", [0, 4])
def test_tokens_between_the_blocks_are_bf16_or_float32_and_weights_and_gradients_float32(
    precision: str, tokens: torch.dtype, text: int
) -> None:
    recipe = recipe_of(Path(), [f"--deepspeed.precision={precision}", f"--model.text_tokens={text}"])
    model, _ = build_model(recipe.model, 32, CLASSES, 50 if text else 0)
    found: set[torch.dtype] = set()
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda *call: found.update((call[1][0].dtype, call[2].dtype)))
    make_forward(model, recipe, CPU)(batch_of(recipe)).float().sum().backward()
    assert found == {tokens}
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_a_run_whose_products_are_not_the_recipes_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = write_shard_set(tmp_path / "set", {"train": [24]}, baked=20)
    from dist_train.train import step

    monkeypatch.setattr(step, "set_arithmetic", lambda model, config: None)  # as autocast outside the engine was
    changes = {"deepspeed__precision": "bf16", "train__epochs": 1, "optim__warmup_steps": 0}
    assert train(shards, tmp_path / "run", **IFA | changes) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: deepspeed.precision is bf16, but what ran is float32 in 100 % of matrix products")


def test_a_run_says_what_its_products_were_and_what_auto_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shards = write_shard_set(tmp_path / "set", {"train": [24]}, baked=20)
    changes = {"train__epochs": 1, "optim__warmup_steps": 0}
    assert train(shards, tmp_path / "run", **IFA | changes) == 0
    assert capfd.readouterr().err.count("float32 in 100 % of matrix products\n") == 1
    assert read_summary(tmp_path / "run")["matrix_products"] == "float32 in 100 % of matrix products"
    resolved = recipe_from_run(tmp_path / "run")
    assert resolved.deepspeed.precision == "float32" and resolved.model.compile == "none"


def test_products_are_counted_by_type_forward_and_backward() -> None:
    first, second = nn.Linear(7, 11), nn.Linear(11, 5)
    inputs = torch.randn(3, 7)
    with MatrixProducts() as products:
        hidden = first(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            result = second(hidden)
        result.float().sum().backward()
    # The first layer has no gradient of its input.
    assert products.flops == {"float32": 2 * (2 * 3 * 7 * 11), "bf16": 3 * (2 * 3 * 11 * 5)}
    assert products.shares()["bf16"] == pytest.approx(990 / (990 + 924))
    with pytest.raises(WorkError, match=r"what ran is bf16 in 51.7 %, float32 in 48.3 % of matrix products"):
        check_products(DeepSpeedConfig(precision="bf16"), products)


@pytest.mark.parametrize(
    ("gpu", "has_bf16", "wanted"), [(True, True, "bf16"), (True, False, "float32"), (False, True, "float32")]
)
def test_auto_is_bf16_where_the_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, has_bf16: bool, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert precision_of(DeepSpeedConfig()) == {"bf16": "bf16_autocast"}.get(wanted, wanted)
    assert precision_of(DeepSpeedConfig(zero_stage=1)) == wanted
    assert precision_of(DeepSpeedConfig(precision="tf32")) == "tf32"
    assert compute_dtype(DeepSpeedConfig()) == {"bf16": torch.bfloat16, "float32": torch.float32}[wanted]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_only_tf32_lets_a_gpu_round_the_products_of_float32(precision: str) -> None:
    from dist_train.train.precision import set_arithmetic

    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    model, _ = build_model(recipe_of(Path(), []).model, 32, CLASSES, 0)
    try:
        for switch in switches:
            switch.allow_tf32 = precision != "tf32"
        set_arithmetic(model, DeepSpeedConfig(precision=precision))  # type: ignore[arg-type]
        assert [switch.allow_tf32 for switch in switches] == [precision == "tf32"] * 2
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"precision": "tf32"}, "deepspeed.precision tf32 needs a GPU; on the CPU use bf16 or float32"),
        (
            {"precision": "bf16_autocast", "zero_stage": 2},
            "bf16_autocast needs deepspeed.zero_stage 0; ZeRO 2 has bf16",
        ),
    ],
)
def test_a_precision_that_cannot_be_is_refused_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UseError, match=line):
        check_combination(Recipe(deepspeed=DeepSpeedConfig(**options)), "cpu")


def test_a_layer_norm_gives_the_type_it_gets_and_the_same_numbers() -> None:
    from dist_train.models.backbones import LayerNorm

    norm = LayerNorm(24, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    tokens = torch.randn(3, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(tokens).dtype == torch.float32
        low = norm(tokens.bfloat16())
    assert low.dtype == torch.bfloat16

    def exact(values: Tensor) -> Tensor:
        values = values.double()
        centred = values - values.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / scale * norm.weight.double() + norm.bias.double()

    torch.testing.assert_close(norm(tokens).double(), exact(tokens), atol=1e-5, rtol=1e-5)
    rounded = exact(tokens.bfloat16())  # three roundings of the output, the weight and the bias
    torch.testing.assert_close(low.double(), rounded, atol=0.03, rtol=0.02)


def test_recipes_of_runs_from_before_compile_had_modes_are_read(tmp_path: Path) -> None:
    for old, new in (("false", "none"), ("true", "kernels")):
        (tmp_path / "recipe.yaml").write_text(f"model:\n  compile: {old}\n")
        assert recipe_from_run(tmp_path).model.compile == new


def attention(name: str, gradient: bool) -> None:
    """One of the operators that SDPA becomes on a GPU, of bf16 tensors that are none (device meta)."""
    factors = [torch.empty(2, 3, 8, 16, dtype=torch.bfloat16, device="meta") for _ in range(5)]
    sums = torch.empty(2, 3, 8, dtype=torch.float32, device="meta")
    state = torch.empty((), dtype=torch.int64, device="meta")
    aten = torch.ops.aten
    if name == "flash" and not gradient:
        aten._scaled_dot_product_flash_attention(*factors[:3])
    elif name == "flash":
        aten._scaled_dot_product_flash_attention_backward(*factors, sums, None, None, 8, 8, 0.0, False, state, state)
    elif name == "efficient" and not gradient:
        aten._scaled_dot_product_efficient_attention(*factors[:3], None, True)
    elif name == "efficient":
        aten._scaled_dot_product_efficient_attention_backward(
            *factors[:4], None, factors[4], sums, state, state, 0.0, [True, True, True, False]
        )
    elif not gradient:
        aten._scaled_dot_product_cudnn_attention(*factors[:3], None, True)
    else:
        aten._scaled_dot_product_cudnn_attention_backward(
            *factors, sums, state, state, None, None, None, 8, 8, 0.0, False
        )


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_a_gpus_attention_is_counted_by_its_factors(name: str, gradient: bool) -> None:
    """It also reads float32 sums and, last, the integer state of its random numbers."""
    with MatrixProducts() as products:
        attention(name, gradient)
    assert list(products.flops) == ["bf16"]
