"""The paper's tables and the study, in small: every cell and run is there, and none is trained twice."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.__main__ import main
from benchmarks.claims import paper, study
from benchmarks.claims.paper import row_of, table_cells
from dist_train.errors import UseError, WorkError

PRINTED = {  # the paper's "Difference", relative percent, in the order of its tables
    "3": [2.57, 6.78, 8.19, 20.78, 2.96, 7.63, 6.19, 17.15],
    "5": [2.91, 3.07, 2.93, 3.02, 3.77, 3.83, 3.34, 4.99],
    "6": [0, 1.36, 3.92, 8.39, 19.41, -0.62, 0.52, 3.61, 10.00, 28.39],
}


@pytest.mark.parametrize("table", PRINTED)
def test_the_named_baselines_give_the_differences_that_the_paper_prints(table: str) -> None:
    rows = [row_of(cell, "full") for cell in table_cells(table, "full", None)]
    assert [row["paper_difference_percent"] for row in rows] == pytest.approx(PRINTED[table], abs=0.011)
    assert all(row["baseline"] and row["top1"] is None and row["difference_points"] is None for row in rows)


def test_at_full_scale_a_run_is_compared_with_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cell = next(cell for cell in table_cells("6", "full", None) if cell.name == "b16-batch256")
    for recipe, top1 in ((cell.recipe, 0.75), (cell.own_baseline, 0.6)):
        assert recipe is not None
        Path(recipe.train.run).mkdir(parents=True)
        written = yaml.safe_dump(json.loads(json.dumps(asdict(recipe))))
        (Path(recipe.train.run) / "recipe.yaml").write_text(written)
        summary = {"evaluations": {"test": {"top1": top1}}, "commit": "0123456789"}
        (Path(recipe.train.run) / "summary.json").write_text(json.dumps(summary))
    row = row_of(cell, "full")
    assert row["difference_points"] == pytest.approx(75 - row["paper_top1"])
    assert (row["our_difference_points"], row["trained_at"]) == (15, "0123456")


@pytest.mark.launch
@pytest.mark.parametrize(
    ("table", "cell"), [("5", "vilt-b32-daf"), pytest.param("2", "b32-batch256-64px", marks=pytest.mark.slow)]
)
def test_a_cell_of_the_paper_runs_small_and_is_printed_beside_the_papers(
    table: str, cell: str, tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "SMALL_PICTURES", 120)
    monkeypatch.setattr(paper, "SMALL_EPOCHS", 1)
    assert main(["paper", "--table", table, "--scale", "small", "--cells", cell]) == 0
    printed = capsys.readouterr().out
    rows = {row["cell"]: row for row in json.loads((results / f"paper/table{table}-small.json").read_bytes())["rows"]}
    summary = next((tmp_path / f"runs/paper-small/table{table}").glob("*/summary.json"))
    top1 = 100 * json.loads(summary.read_bytes())["evaluations"]["test"]["top1"]
    assert rows[cell]["top1"] == pytest.approx(top1, abs=0.01)
    assert rows[cell]["difference_points"] is None  # of another model on other data
    assert [row["cell"] for row in rows.values() if row["top1"] is not None] == [cell]
    assert f"{rows[cell]['paper_top1']}" in printed
    assert main(["paper", "--table", table, "--scale", "small", "--render"]) == 0
    assert len(list((tmp_path / "runs/paper-small").glob("*/*/summary.json"))) == 1


def test_a_cell_that_a_table_has_not_is_named(capsys: Any) -> None:
    assert main(["paper", "--table", "5", "--cells", "vit-b8"]) == 2
    assert "table 5 has no cell 'vit-b8'; it has vit-b16-daf" in capsys.readouterr().err


def test_pictures_that_are_there_are_those_that_the_study_asks_for(tmp_path: Path) -> None:
    asked = study.Arguments("s", tmp_path, pictures=30, characters=4, pretraining_pictures=30, pretraining_characters=4)
    study.make_data(asked)
    study.make_data(asked)
    with pytest.raises(UseError, match="pretraining: has 30 pictures of 4 characters, not 40 of 4; remove"):
        study.make_data(replace(asked, pretraining_pictures=40))


def test_weights_of_an_earlier_pretraining_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = study.Arguments("s", tmp_path, pictures=30, characters=4, pretraining_pictures=30, pretraining_characters=4)
    study.make_data(asked)
    weights, summary = (tmp_path / f"pretraining-vit_tiny_patch32{end}" for end in (".safetensors", "/summary.json"))
    summary.parent.mkdir()
    monkeypatch.setattr(study, "finish_runs", lambda recipes, *_: recipes)
    for file, time in ((summary, 1000), (weights, 1001)):
        file.touch()
        os.utime(file, (time, time))
    study.pretrain(asked, ["vit_tiny_patch32"])
    os.utime(summary, (1002, 1002))
    with pytest.raises(UseError, match=r"patch32\.safetensors: is older than its pretraining"):
        study.pretrain(asked, ["vit_tiny_patch32"])
    weights.unlink()
    with pytest.raises(WorkError, match="its weights could not be exported"):  # there is no checkpoint
        study.pretrain(asked, ["vit_tiny_patch32"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--batches=0,16", "error: --batches: numbers from 1 on"),
        ("--epochs=0", "error: --epochs: 0 is not at least 1"),
        ("--seeds=0", "--seeds is 0; it must be at least 1"),
    ],
)
def test_a_study_that_cannot_be_is_refused_before_its_data_are_made(
    more: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "--name", "s", f"--scratch={tmp_path / 'study'}", more]) == 2
    assert said in capsys.readouterr().err
    assert main(["study", "--name", "s", f"--scratch={tmp_path / 'study'}", "--experiments=text"]) == 2
    assert "no run in this study" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.launch
@pytest.mark.slow
def test_the_study_in_small(tmp_path: Path, results: Path, capsys: Any) -> None:
    """Every experiment of it once, stopped half-way and gone on with."""
    vocabulary = tmp_path / "vocab.txt"
    letters = "abcdefghijklmnopqrstuvwxyz1_"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]))
    study = "study --name s --batches 4,8,16 --seeds 1 --epochs 2 --characters 4 --pictures 60 --lr 0.01 --jobs 2"
    study += (
        f" --pretraining-characters 4 --pretraining-pictures 80 --pretraining-epochs 1 --scratch {tmp_path / 'study'}"
    )
    assert main([*study.split(), "--vocabulary", str(vocabulary), "--experiments", "batch"]) == 0
    first = json.loads((results / "study/s.json").read_bytes())["rows"]
    assert len(first) == 6
    assert main([*study.split(), "--vocabulary", str(vocabulary)]) == 0
    document = json.loads((results / "study/s.json").read_bytes())
    rows = document["rows"]
    assert document["parameters"]["finished_runs"] == document["parameters"]["planned_runs"] == len(rows) == 25
    assert rows[:6] == first  # not trained again
    train_samples = 30
    for row in rows:
        assert row["images_seen"] >= row["epochs"] * train_samples > row["images_seen"] - row["batch_size"]
        assert row["steps"] == row["images_seen"] // row["batch_size"]
        assert 0 <= row["top1"] <= 1 and row["test_samples"] > 0
    equal = {row["batch_size"]: row["steps"] for row in rows if row["budget"] == "steps"}
    middle = next(row["steps"] for row in rows if row["batch_size"] == 8 and row["budget"] == "epochs")
    assert set(equal) == {4, 16} and all(abs(steps - middle) <= 1 for steps in equal.values())
    assert {row["text_tokens"] for row in rows} == {0, 16, 32, 64}
    assert any("accuracy fall" in answer["question"] for answer in document["answers"])
    assert main([*study.split(), "--experiments", "magic"]) == 2
    assert "no experiment 'magic'" in capsys.readouterr().err
