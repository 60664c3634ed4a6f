"""Standard output is the result's alone, in every command; pipes that are closed and files that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.cli import main
from dist_train.errors import CLOSED_PIPE
from tests.harness import environment, jpeg_bytes, train, write_shard_set


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard_set(tmp_path_factory.mktemp("output") / "set", {"train": [8], "test": [6]})


@pytest.fixture(scope="module")
def run(shards: Path) -> Path:
    """A run of one step."""
    folder = shards.parent
    assert train(shards, folder / "run", train__batch_size=8, train__epochs=1) == 0
    (folder / "image.jpg").write_bytes(jpeg_bytes(1))
    return folder / "run"


def command(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """A process of the project's, `MODULE WORD ...`."""
    options = {"capture_output": True, "text": True, "env": environment(), "cwd": "/"} | options
    return subprocess.run([sys.executable, "-m", *map(str, words)], **options)


def test_nothing_but_what_is_said_comes_to_standard_output() -> None:
    script = (
        "import os, ctypes, atexit\n"
        "from dist_train.output import keep_stdout, say\n"
        "keep_stdout()\n"
        "print('of Python'); os.write(1, b'of C\\n'); os.system('echo of a process')\n"
        "c = ctypes.CDLL(None); c.puts(b'of C that buffers')\n"
        "atexit.register(print, 'at the end')\n"
        "say('the result', 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert done.stdout == "the result\n2\n"
    assert {"of Python", "of C", "of a process", "of C that buffers", "at the end"} == set(done.stderr.splitlines())


def test_the_output_of_evaluate_is_json_and_that_of_predict_and_grid_their_lines(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated = command("dist_train.cli", "evaluate", run)
    figures = json.loads(evaluated.stdout)
    assert figures["samples"] == 6 and figures["csv"] == str(run / "evaluation_test.csv")
    own = (run / "evaluation_test.csv").read_bytes()
    other = write_shard_set(tmp_path / "other", {"test": [9]}, baked=20)
    assert main(["evaluate", str(run), "--checkpoint", "last", "--shards", str(other)]) == 0
    assert json.loads(capsys.readouterr().out)["csv"] == str(run / "evaluation_test_last_other.csv")
    assert (run / "evaluation_test.csv").read_bytes() == own != (run / "evaluation_test_last_other.csv").read_bytes()
    assert main(["predict", str(run), str(run.parent / "image.jpg"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0] == str(run.parent / "image.jpg") and lines[1].startswith("  0.")
    assert main(["grid", str(run), "--output", str(tmp_path / "picture.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'picture.png'}\n"


def test_what_evaluate_cannot_know_is_null_and_its_output_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The least frequent class has two samples, both to train on.
    shards = write_shard_set(tmp_path / "set", {"train": [8], "test": [3]}, baked=20)
    assert train(shards, tmp_path / "run", train__batch_size=4, train__epochs=1) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    figures = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert figures["least_frequent_tenth_of_classes_top1"] is None


def test_a_name_that_is_no_text_or_that_the_terminal_cannot_show_is_no_error() -> None:
    script = "import os; from dist_train.output import *; keep_stdout(); say(os.fsdecode(b'caf\\xe9'), '\\u521d')"
    for encoding, said in (("utf-8", b"caf\xe9\n\xe5\x88\x9d\n"), ("ascii", b"caf\\udce9\n\\u521d\n")):
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment(PYTHONIOENCODING=encoding), capture_output=True
        )
        assert (done.returncode, done.stdout) == (0, said), done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "dist_train.cli train --help",
        "dist_train.cli evaluate --help",
        "shards info {set}",
        "shards info {set} --json",
        "shards build --help",
        "benchmarks loader --help",
    ],
)
def test_a_pipe_that_nobody_reads_ends_the_command_without_a_word(shards: Path, words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = words.format(set=shards)
    done = command(*words.split(), capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    # argparse answers for its --help by itself, with 0.
    assert done.returncode in ([CLOSED_PIPE] if "info" in words else [0, CLOSED_PIPE])
    assert not any(word in done.stderr for word in ("Traceback", "BrokenPipe", "Exception", "error: ")), done.stderr


def test_a_closed_standard_output_is_not_that_of_the_next_file(tmp_path: Path) -> None:
    script = (
        "import os, sys; from dist_train.output import *; keep_stdout()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'of C'); say('result'); file.write('own')"
    )
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "$0" >&-', script], env=environment(), capture_output=True
    )
    assert (done.returncode, (tmp_path / "file").read_text()) == (0, "own"), done.stderr


def test_a_full_disk_behind_standard_output_is_one_line(shards: Path) -> None:
    with open("/dev/full", "w") as full:
        done = command("shards", "info", shards, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "error: standard output cannot be written (No space left on device)\n"


def test_where_the_run_folder_cannot_be_written_the_result_is_said_first(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = run / "evaluation_test.csv"
    table.unlink(missing_ok=True)
    table.mkdir()  # also root cannot write there
    try:
        assert main(["evaluate", str(run)]) == 0
        said = capsys.readouterr()
        figures = json.loads(said.out)
        assert figures["samples"] == 6 and figures["csv"] is None
        (line,) = [line for line in said.err.splitlines() if "cannot be written" in line]
        assert line == f"warning: {table}: cannot be written (Is a directory); --csv FILE puts it elsewhere"

        assert main(["evaluate", str(run), "--csv", str(tmp_path / "none" / "table.csv")]) == 1
        said = capsys.readouterr()
        assert json.loads(said.out)["top1"] == figures["top1"]
        assert f"error: {tmp_path}/none/table.csv: cannot be written (No such file or directory)" in said.err
    finally:
        table.rmdir()

    assert main(["grid", str(run), "--output", str(tmp_path / "none" / "p.png")]) == 1
    assert f"error: {tmp_path}/none/p.png: cannot be written (No such" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["predict {run} x.jpg --top 0", "evaluate {run} --batch-size -1"])
def test_numbers_of_the_commands_begin_with_1(run: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.format(run=run).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: argument --") and "must be a number from 1 on" in line


def test_a_word_that_a_command_does_not_take_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("evaluate runs/mine --chekpoint best".split()) == 2
    said = "unrecognized arguments: --chekpoint best; dist-train COMMAND --help says what there is"
    assert capsys.readouterr().err == f"error: {said}\n"
    assert main(["evaluate"]) == 2
    assert capsys.readouterr().err.endswith("required: run; dist-train evaluate --help says what there is\n")


def test_deepspeed_does_not_remark_upon_a_machine_without_a_gpu() -> None:
    without = {name: value for name, value in environment().items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", "import dist_train.train.engine"],
        env=without,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "accelerator" not in done.stdout + done.stderr
