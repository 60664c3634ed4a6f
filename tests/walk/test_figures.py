"""The figures of the documents are those of the result files that they name."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import yaml
from scipy import stats

from benchmarks.claims.histogram import colour_histogram_accuracy
from benchmarks.claims.knee_fit import excess
from benchmarks.claims.knee_report import losses_of
from benchmarks.claims.study_runs import Seeds, accuracies
from benchmarks.speed.head_cost import Size, share_of_step
from dist_train.models.heads import HEADS
from shards.__main__ import main as shards_main
from tests.harness import REPOSITORY
from tests.walk.documents import result, text_in_one_line, text_of

GROCERY = (REPOSITORY / "launch" / "recipes" / "grocery.yaml").read_text(encoding="utf-8")
GROCERY_TRAIN = 2640  # photos


def ratios(name: str) -> list[str]:
    """How many times as fast ours is as FFCV, FFCV without jitter, and timm: round by round, as the report has it."""
    times = {row["loader"]: row["ours_is_times"] for row in result(f"loader/{name}")["rows"]}
    return [f"{times[peer]:.1f}" for peer in ("FFCV", "FFCV, no jitter", "timm")]


def test_the_loaders_ratios_are_those_of_the_committed_results() -> None:
    with_jitter, without, timm = ratios("grocery-baked160")
    assert (
        f"load {with_jitter} times as fast as in FFCV, {without} times as fast as in FFCV without its jitter, "
        f"{timm} times as fast as in timm" in text_in_one_line("README.md")
    )
    with_jitter, without, timm = ratios("grocery-256")
    assert (
        f"At 256 px ours is {with_jitter}, {without} and {timm} times as fast as FFCV, FFCV without its jitter and timm"
        in text_in_one_line("docs/benchmarks.md")
    )
    times = {row["loader"]: row["ours_is_times"] for row in result("loader/grocery-baked160-usual")["rows"]}
    peers = [f"{times[peer]:.1f}" for peer in ("FFCV", "DALI, its own reader and operators", "timm", "SPDL")]
    paper = times["this project, the paper's augmentation"]
    text = text_in_one_line("docs/benchmarks.md")
    assert f"ours is {', '.join(peers[:3])} and {peers[3]} times as fast as FFCV, DALI's own reader and" in text
    assert f"timm and SPDL, and {paper:.1f} times as fast as with the paper's augmentation" in text


def test_the_gpus_figures_are_those_of_the_committed_result() -> None:
    rows = {row["what"]: row for row in result("gpu/nvidia-h200")["rows"]}
    small = rows["step: vit_base_patch16 cls batch 16, bf16_autocast, compiled"]
    large = rows["step: vit_large_patch16 cls batch 256, bf16_autocast, compiled"]
    loader = rows["loader: on the GPU, batch 256"]
    in_graphs, launched = round(small["graphs_images_per_s"]), round(small["images_per_s"])
    base = rows["step: vit_base_patch16 cls batch 256, bf16_autocast, compiled"]
    assert {row["arm"] for row in (small, large, base)} == {"synthetic"}
    readme, training = text_in_one_line("README.md"), text_in_one_line("docs/training.md")
    assert f"compiled PyTorch loop, one of a ViT-B/16 {base['over_bare']:.3f} times." in readme
    assert "This is the model alone, in `bf16_autocast` at 128 px, on a batch that is on the GPU" in readme
    assert f"with its loader ViT-L/16 trains {round(large['loaded_images_per_s']):,}." in training
    assert f"trains {in_graphs:,} images a second on an H200 in CUDA graphs, and {launched:,} when" in readme
    assert f"a step of a ViT-L/16 takes {large['over_bare']:.3f} times as long as" in readme
    assert (
        f"ViT-L/16 trains {round(large['graphs_images_per_s']):,} images a second at batch 256 and ViT-B/16 "
        f"{in_graphs:,} at batch 16, both in CUDA graphs; without graphs the latter is {launched:,}." in training
    )
    assert f"at {round(loader['images_per_s']):,} a second, {loader['over_dali']:.2f} times the rate" in training


def test_what_is_said_of_the_gpus_pixels_memory_and_profiles_is_in_their_results() -> None:
    text = text_in_one_line("benchmarks/GPU.md")
    h100, h200 = (
        {row["what"]: row for row in result(f"gpu/{name}")["rows"]} for name in ("nvidia-h100", "nvidia-h200")
    )
    pixels = "check: pixels of the device's pipeline against the CPU's"
    ways = ("train", "train_resized", "eval")
    means = [rows[pixels]["train_mean"] for rows in (h200, h100)]
    most = [max(rows[pixels][f"{way}_highest"] for way in ways) for rows in (h200, h100)]
    assert f"differ from the CPU's by {means[0]:.2f} of 255 on average, {most[0]:.2f} at most" in text
    assert "colours_by" not in h100[pixels] and f"before that kernel, by {means[1]:.2f} and {most[1]:.2f}." in text
    memory = {rows["step: vit_large_patch16 cls batch 256, bf16_autocast"]["memory_over_bare"] for rows in (h100, h200)}
    assert memory == {1.007} and "L not compiled, at most 1.1 | **1.007** | **1.007** |" in text
    profiles = h100["step: vit_large_patch16 cls batch 256, bf16, compiled"]["profiles"]
    own, bare = profiles["own"], profiles["bare_pure"]
    less = {kind: time - bare["by_kind"].get(kind, 0.0) for kind, time in own["by_kind"].items()}
    named = [less[kind] for kind in ("optimizer", "compiled", "matrix products")]
    others = own["total_ms"] - bare["total_ms"] - sum(named)
    assert f"Of the {own['total_ms']:.1f} ms profiled" in text
    assert f"is {bare['total_ms']:.1f} profiled: its optimizer takes {named[0]:.1f} ms less" in text
    assert f"which cast none, {named[1]:.1f} less, its matrix products {named[2]:.1f} less" in text
    assert f"all else {-others:.1f} more" in text


def test_the_run_that_was_killed_is_the_committed_one() -> None:
    (row,) = result("kill/cpu-2-ranks")["rows"]
    assert row["identical_weights"] and row["each_sample_once"] and row["ranks"] == 2
    assert f"two ranks that was killed {row['kills']} times" in text_in_one_line("README.md")


def against(name: str, precision: str) -> Seeds:
    """Points of test accuracy beyond float32's with the same seed."""
    rows = result(f"precision/{name}")["rows"]
    mine, exact = (
        Seeds({row["seed"]: 100 * row["top1"] for row in rows if row["precision"] == of})
        for of in (precision, "float32")
    )
    return mine - exact


def against_float32(name: str, precision: str) -> str:
    """Their mean and its standard error."""
    gains = list(against(name, precision).values())
    return f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains) / len(gains) ** 0.5:.1f}"


def test_what_bf16_costs_is_that_of_the_committed_results() -> None:
    text = text_in_one_line("docs/training.md")
    photos = against("photos", "bf16_autocast")
    assert len(photos) == 12 and photos.sign == 1 and min(photos.values()) > -0.5
    assert f"by {statistics.mean(photos.values()):+.2f} ± {photos.error:.2f} points on a CPU (twelve pairs" in text
    new, before = against("demo-pairs", "bf16_autocast"), against("demo", "bf16_autocast")
    assert f"differs by {against_float32('demo-pairs', 'bf16_autocast')} points over twelve pairs" in text
    assert f"The four pairs before, {against_float32('demo', 'bf16_autocast')} (" in text and len(before) == 4
    together = Seeds(enumerate([*new.values(), *before.values()]))
    most = stats.t.ppf(0.95, len(together) - 1) * together.error - together.mean
    assert f"all sixteen together are {together}, which excludes a loss above {most:.1f} points" in text
    assert (len(new), len(together)) == (12, 16)
    for precision, said in (("bf16_autocast", "seven pairs have {}"), ("bf16", "{} over six on the H100")):
        assert said.format(against_float32("demo-h100", precision)) in text
    assert f"{against_float32('demo', 'bf16')} over three pairs on a CPU" in text


def test_what_zero_3_takes_is_that_of_the_committed_results() -> None:
    (host,) = (row for row in result("engine/host-cpu")["rows"] if row["zero_stage"] == 3)
    cable = {row["contestant"]: row for row in result("exchange/vit-s-zero-settings")["rows"]}
    whole, layers = (cable[name]["step_over_ddp"] for name in ("ZeRO 3", "ZeRO 3, layer by layer"))
    text = text_in_one_line("docs/training.md")
    assert f"a step is {host['ours_ratio']:.1f} times a bare loop's where computing takes no time" in text
    assert f"with DeepSpeed's defaults {host['default_ratio']:.1f} (" in text
    assert f"{whole:.2f} of the step of torch's DDP, {layers:.2f} layer by layer" in text


def test_the_grocery_recipe_says_how_many_images_it_shows() -> None:
    assert f"# {yaml.safe_load(GROCERY)['train']['epochs'] * GROCERY_TRAIN:,} images" in GROCERY


@pytest.mark.slow
def test_the_grocery_recipe_stands_beside_what_colours_give_on_the_same_samples(
    shared_data: Path, tmp_path: Path
) -> None:
    labels = str(shared_data / "grocery" / "labels.csv")
    assert shards_main(["build", labels, str(tmp_path / "set"), "--class-column=coarse", "--size=96"]) == 0
    accuracy, samples = colour_histogram_accuracy(tmp_path / "set")
    assert (
        f"histograms has {accuracy:.3f} on the same samples" in GROCERY and f"over all {samples:,} samples" in GROCERY
    )


def test_what_the_heads_cost_is_what_is_counted() -> None:
    def percent(head: str, how: str = "compiled", classes: int = 43, form: str = ".1f") -> str:
        return format(100 * share_of_step(head, Size(classes=classes), how), form)

    rows = [
        line for line in text_of("docs/training.md").splitlines() if line.startswith(tuple(f"| `{h}` " for h in HEADS))
    ]
    assert {row.split("`")[1]: row.split("|")[-2].strip() for row in rows} == {
        head: percent(head, form=".2f") if head != "cls" else "0" for head in HEADS
    }
    text = text_in_one_line("docs/training.md")
    assert f"IFA as the paper's code computes it would add {percent('stacked')} %" in text
    assert {percent("all_layers", "eager"), percent("attentive", "eager")} == {"1.1"} and "they add 1.1 %" in text
    many, most = percent("all_layers", classes=1000), percent("all_layers", classes=3263)
    assert f"it adds {many} % with 1,000 classes and {most} % with 3,263" in text


def test_what_lies_in_the_blocks_is_what_the_probe_found() -> None:
    first, *others = result("probe/grocery-dinov2-small")["rows"]
    text = text_in_one_line("docs/training.md")
    assert f"tell {first['test_top1']:.1f} % of 2,485 photos" in text
    places = (
        "From the mean of the blocks' [CLS] it is",
        "the last four",
        "from all of them",
        "averages of the patches",
    )
    for place, row in zip(places, others, strict=True):
        assert f"{place} {row['points']:+.1f} ± {row['standard_error']:.1f}" in text


def test_what_the_study_says_of_ifa_is_what_its_runs_say() -> None:
    rows = result("study/cpu")["rows"]
    gains = {
        (data, batch): accuracies(rows, data=data, head="ifa", batch_size=batch)
        - accuracies(rows, data=data, head="cls", batch_size=batch)
        for data in ("drawn", "photos")
        for batch in (16, 32, 256)
    }
    assert all(abs(gain.mean) < 1 for (_, batch), gain in gains.items() if batch < 256)
    drawn, photos = (-gains[data, 256].mean for data in ("drawn", "photos"))
    text = text_in_one_line("docs/training.md")
    assert f"and {drawn:.1f} (drawn characters) and {photos:.1f} points (photos) below it at batch 256." in text


def test_a_recipe_of_photos_reaches_what_is_said_of_it_and_agrees_with_a_plain_loop() -> None:
    document = result("agreement/grocery-dinov2")
    ours, plain = ([100 * row["top1"] for row in document["rows"] if row["arm"] == arm] for arm in ("ours", "plain"))
    apart, error = document["difference"]["points"], document["difference"]["standard_error"]
    assert len(ours) == len(plain) == 3 and statistics.mean(ours) > 90 and abs(apart) < 2 * error
    text = text_in_one_line("docs/finetuning.md")
    both = f"is {statistics.mean(ours):.1f} %, the plain loop's {statistics.mean(plain):.1f} %"
    assert f"{both} ({apart:+.2f} ± {error:.2f} points" in text
    recipe = " ".join((REPOSITORY / "launch/recipes/grocery_dinov2.yaml").read_text().replace("#", " ").split())
    reached = f"{statistics.mean(ours):.1f} % ({min(ours):.1f} to {max(ours):.1f})"
    assert f"{reached}, {apart:+.2f} +- {error:.2f} points" in recipe


def test_how_well_the_noise_scale_predicts_is_what_the_committed_knees_say() -> None:
    knees = result("knee/frozen")["knees"]
    assert len(knees) == 14 and len({knee["setting"] for knee in knees}) == 7
    known = [knee for knee in knees if not knee["doubt"] and knee["predicted"]]
    assert len(known) == 7
    knee, fitted = ([one[name] / one["predicted"] for one in known] for name in ("knee", "fitted"))
    assert (f"{min(knee):.1f}", f"{max(knee):.1f}", sum(0.5 <= ratio <= 2 for ratio in knee)) == ("0.5", "1.5", 6)
    assert (f"{min(fitted):.1f}", f"{max(fitted):.0f}", sum(0.5 <= ratio <= 2 for ratio in fitted)) == ("0.7", "17", 4)
    text = text_in_one_line("docs/training.md")
    assert "is 0.5 to 1.5 times the predicted one, in six of them within a factor of two" in text
    assert "it is 0.7 to 17 times the prediction, within a factor of two in four" in text
    (one,) = result("knee/photos")["knees"]
    assert one["doubt"] is None and one["seeds"] == 4

    def with_interval(name: str) -> str:
        return f"{one[name]:.0f} ({one[f'{name}_low']:.0f} to {one[f'{name}_high']:.0f})"

    assert f"the batch is {one['says']}, the fitted one {with_interval('fitted')}" in text
    assert (
        f"the prediction {with_interval('predicted')}. From batch 64 on the lowest rate tried was best there." in text
    )
    tried = {row["factor"] for row in result("knee/photos")["rows"] if row["batch"] > 0}
    assert [batch for batch, factor in one["factors"].items() if factor == min(tried)] == ["64", "128", "256"]
    rows = result("knee/frozen")["rows"]
    lowest = [
        (one["setting"], batch)
        for one in known
        for batch, factor in one["factors"].items()
        if factor
        == min(row["factor"] for row in rows if (row["setting"], row["stage"]) == (one["setting"], one["stage"]))
    ]
    assert (
        [batch for _, batch in lowest].count("256") == 5 and ("CLS, SGD, photos", "128") in lowest and len(lowest) == 6
    )
    assert "In five of the seven batch 256 was best at the lowest rate tried, for SGD 128 too" in text
    losses = losses_of(rows, "CLS, SGD, photos", 0.05)
    assert losses is not None
    above = [round(100 * value) for value in excess(losses.values).mean(axis=0) / losses.values[:, 0].mean()]
    assert above[2:] == [4, 4, 12, 71] and "4 % higher at batches 32 and 64, 12 % at 128 and 71 % at 256" in text
