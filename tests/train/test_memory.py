"""The memory of a step that is predicted is what real steps take by torch's own account."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dist_train.config import Recipe
from dist_train.models.build import build_model
from dist_train.parse import parse_recipe
from dist_train.place import Place
from dist_train.train.ema import WeightAverage
from dist_train.train.engine import init_process_group
from dist_train.train.memory import LiveBytes, blank_batch, predict_step
from dist_train.train.setup import build_step
from tests.train.forked_ranks import run_on

OUTPUTS, VOCABULARY = 7, 50


def recipe_of(words: str) -> Recipe:
    small = "--model.backbone vit_tiny_patch16 --data.image_size 64 --train.batch_size 16 --deepspeed.precision float32"
    return parse_recipe([*small.split(), *words.split()])[0]


def living() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measured_mb(recipe: Recipe, place: Place) -> float:
    """What is there before the second step, and the most that it allocates beyond, by torch's profiler."""
    before = living()
    torch.manual_seed(0)
    vocabulary = VOCABULARY if recipe.model.text_tokens else 0
    model, _ = build_model(recipe.model, recipe.data.image_size, OUTPUTS, vocabulary)
    step = build_step(model, recipe, place, [1] * OUTPUTS)
    average = WeightAverage(model, recipe.train.ema) if recipe.train.ema else None
    micro = recipe.train.micro_batch_size or recipe.train.batch_size // place.world_size
    assert isinstance(micro, int)

    def batches() -> Iterator[object]:
        while True:
            yield blank_batch(recipe, micro, OUTPUTS, torch.device("cpu"))

    step(batches(), 0.0, 0)  # type: ignore[arg-type]
    held = living() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        step(batches(), 0.0, 1)  # type: ignore[arg-type]
    now = most = 0
    for event in traced.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    step.engine.destroy()
    del average
    return (held + most) / 1e6


def check(recipe: Recipe, place: Place, within: float) -> None:
    vocabulary = VOCABULARY if recipe.model.text_tokens else 0
    predicted = predict_step(recipe, OUTPUTS, vocabulary, place.world_size)
    assert predicted.peak_mb == pytest.approx(measured_mb(recipe, place), rel=within)
    of = predicted.weights_mb + predicted.gradients_mb + predicted.optimizer_mb
    assert predicted.peak_mb >= predicted.weights_mb and predicted.activations_mb >= 0 and of > 0


REPLICAS = {
    "ViLT with IFA, blocks again, accumulated, averaged": "--model.head ifa --model.text_tokens 6 "
    "--model.checkpoint_blocks true --optim.name adamw --train.micro_batch_size 4 --train.ema 0.9",
    "bf16, mixed, clipped, frozen": "--deepspeed.precision bf16_autocast --data.cutmix 0.5 --optim.clip_norm 1 "
    "--model.freeze 6 --model.drop_path 0.1",
}
OTHERS = {
    "plain": "",
    "adapters": "--model.lora 4",
    "dropout": "--model.dropout 0.1",
    "tags": "--data.labels tags --data.mixup 0.2",
    "CNN": "--model.backbone resnet18",
}


@pytest.mark.parametrize("words", REPLICAS.values(), ids=REPLICAS)
def test_a_step_takes_what_is_predicted(words: str) -> None:
    check(recipe_of(words), init_process_group(), within=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("words", OTHERS.values(), ids=OTHERS)
def test_a_step_of_other_models_takes_what_is_predicted(words: str) -> None:
    check(recipe_of(words), init_process_group(), within=0.02)


def _check_zero(stages: dict[str, float]) -> None:
    place = init_process_group()
    for words, within in stages.items():
        check(recipe_of(words), place, within)


ZERO = {
    f"--deepspeed.zero_stage {stage} --deepspeed.precision {precision} --optim.name {optimizer}": 0.1
    for stage in (0, 1, 2, 3)
    for precision, optimizer in (("float32", "adamw"), ("bf16", "sgd"))
}


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_of_zero_takes_what_is_predicted_to_a_tenth(ranks: int, tmp_path: Path) -> None:
    run_on(ranks, tmp_path, _check_zero, ZERO)


@pytest.mark.slow
def test_a_rank_keeps_less_the_higher_the_stage_and_the_more_ranks() -> None:
    """Its peak too, but for stage 3 of so small a model: all its weights may be gathered at once."""
    found = {
        (stage, ranks): predict_step(
            recipe_of(f"--deepspeed.zero_stage {stage} --train.batch_size {2 * ranks}"), OUTPUTS, 0, ranks
        )
        for stage, ranks in ((1, 2), (2, 2), (2, 8), (3, 8))
    }
    kept = {key: each.weights_mb + each.gradients_mb + each.optimizer_mb for key, each in found.items()}
    assert kept[1, 2] > kept[2, 2] > kept[2, 8] > kept[3, 8]
    assert found[1, 2].peak_mb > found[2, 2].peak_mb > found[2, 8].peak_mb


def test_predicting_takes_no_memory_and_no_random_numbers() -> None:
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    before = living()
    recipe = recipe_of("--train.batch_size 4096 --model.checkpoint_blocks true")
    assert predict_step(recipe, OUTPUTS).peak_mb > 1000
    assert living() - before < 1e6
    assert torch.equal(torch.rand(2), drawn)


def test_live_bytes_follow_what_is_made_and_let_go_of() -> None:
    with LiveBytes(block=512) as live:
        first = torch.zeros(100)  # 400 bytes, which take a block
        view = first[:10]
        first = first.add_(1)
        assert live.now == 512
        second = first * 2
        assert (live.now, live.peak) == (1024, 1024)
        del first, second
        assert live.now == 512  # the view holds it
        del view
        assert (live.now, live.peak) == (0, 1024)
        live.forget()
        assert live.peak == 0
