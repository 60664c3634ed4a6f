"""Training through DeepSpeed follows a loop of torch alone, step by step, whatever divides the work."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from dist_train.models.names import VIT_SIZES
from dist_train.place import Place
from tests.harness import write_shard_set
from tests.train.deepspeed_worker import (
    BATCH,
    MODELS,
    NARROW,
    STEPS,
    loader_of,
    losses_through_deepspeed,
    rate_of,
    recipe_of,
    start,
)

OPTIMIZERS = {
    "sgd": ["--optim.name=sgd", "--optim.lr=0.003", "--optim.weight_decay=0.05", "--optim.decay_all=true"],
    "adamw": ["--optim.name=adamw", "--optim.lr=0.0005", "--optim.weight_decay=0.05", "--optim.decay_all=true"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", {"train": [11, 8, 5]}, baked=36, text=True)


@pytest.fixture(scope="module")
def plain(shards: Path) -> Iterator[dict[str, list[float]]]:
    """Losses of the plain loop by model and optimizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VIT_SIZES, "tiny", NARROW)
        yield {f"{m}-{o}": losses_of_a_plain_loop(shards, m, o) for m in MODELS for o in OPTIMIZERS}


def losses_of_a_plain_loop(shards: Path, model_name: str, optimizer_name: str) -> list[float]:
    """Whole batches in one process."""
    recipe = recipe_of(shards, [*MODELS[model_name], *OPTIMIZERS[optimizer_name]])
    model, tokenizer = start(recipe)
    if optimizer_name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 0.003, 0.9, weight_decay=0.05)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 5e-4, weight_decay=0.05)
    losses = []
    for step, batch in zip(range(STEPS), loader_of(recipe, Place(), BATCH, tokenizer), strict=False):
        optimizer.param_groups[0]["lr"] = rate_of(recipe, step)
        text = () if batch.text_ids is None else (batch.text_ids, batch.text_mask)
        loss = functional.cross_entropy(model(batch.images, *text), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(
    scope="module",
    params=[(1, 0), (2, 1), *(pytest.param(more, marks=pytest.mark.slow) for more in ((1, 1), (2, 0)))],
    ids=["1 rank", "2 ranks", "1 rank, the others", "2 ranks, the others"],
)
def through_deepspeed(
    request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[float]]:
    """Losses by model, optimizer, accumulation and ZeRO stage, of that many ranks that are started once.

    Every model with every stage, every optimizer with both, and every three together either on one rank or on two.
    """
    (world_size, part), jobs = request.param, {}
    for (i, model), (j, optimizer), zero_stage in product(enumerate(MODELS), enumerate(OPTIMIZERS), range(4)):
        if (i + j + zero_stage) % 2 != part:
            continue
        # One rank and no accumulation is what test_training.py has.
        accumulation = 1 if world_size == 2 and optimizer == "sgd" else 4
        micro_batch = BATCH // world_size // accumulation
        division = [f"--train.micro_batch_size={micro_batch}", f"--deepspeed.zero_stage={zero_stage}"]
        jobs[f"{model}-{optimizer}-{accumulation}-{zero_stage}"] = [*MODELS[model], *OPTIMIZERS[optimizer], *division]
    return losses_through_deepspeed(shards, jobs, world_size, tmp_path_factory.mktemp("ranks"))


@pytest.mark.launch
@pytest.mark.parametrize("zero_stage", range(4))
def test_fifty_losses_are_those_of_a_plain_loop(
    plain: dict[str, list[float]], through_deepspeed: dict[str, list[float]], zero_stage: int
) -> None:
    """CLS, IFA and ViLT; SGD and AdamW; on two ranks without accumulation and with it: within 1e-5 in float32."""
    found = {name: losses for name, losses in through_deepspeed.items() if name.endswith(f"-{zero_stage}")}
    assert len(found) == len(MODELS)
    for combination, losses in found.items():
        expected = plain["-".join(combination.split("-")[:2])]
        assert max(expected[-10:]) < min(expected[:3])  # it learns, so the losses say something
        assert losses == pytest.approx(expected, rel=1e-5), combination
