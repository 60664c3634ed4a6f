"""A new user's walk through the documents: their commands in order, in a fresh clone, in one shell, in small."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import parse as parse_benchmark
from benchmarks.points import environment_of_one_process
from dist_train.cli import _command_parser, parse_recipe
from shards.__main__ import _parser as shards_parser
from tests.harness import REPOSITORY, jpeg_bytes
from tests.walk.documents import DOCUMENTS, broken_links, text_of
from tests.walk.readme import WALK, Run, Skip, commands, in_prose, what_to_do


def clone(folder: Path) -> Path:
    """The files that a clone would have, with this environment as its .venv, already installed."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (REPOSITORY / name).is_file() or (REPOSITORY / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name, follow_symlinks=False)
    environment = folder / ".venv"
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "installed":
            (environment / entry.name).symlink_to(entry)
    (environment / "installed").touch()
    return folder


def photos(folder: Path) -> None:
    """What the user brings: class folders, and two photos to be told."""
    for number in range(60):
        path = folder / "my_images" / f"class {number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(number % 3))
    (folder / "photo.jpg").write_bytes(jpeg_bytes(1))
    (folder / "another.png").write_bytes(jpeg_bytes(2))


def is_activated() -> bool:
    return (Path(sys.prefix) / "bin" / "activate").is_file() and shutil.which("make") is not None


def test_the_readme_is_short_and_begins_with_the_two_commands() -> None:
    assert len(text_of("README.md").splitlines()) <= 150
    assert commands(("README.md",))[:2] == ["make demo", "make test"]


def test_every_link_of_the_documents_leads_somewhere() -> None:
    assert broken_links() == []


def test_every_command_of_the_documents_is_run_or_has_its_reason_and_the_walk_knows_no_others() -> None:
    assert [command for command in commands() if what_to_do(command) is None] == []
    assert [words for words in WALK if not any(command.startswith(words) for command in commands())] == []


def parse(command: str) -> None:
    """Fail where the words of `command` are not those of the program that it names."""
    command = command.partition(" > ")[0].replace("mine.yaml", "grocery.yaml")  # of which the README makes it
    words = shlex.split(command)
    if "--config" in words and words[1] != "-m":
        parse_recipe(words[words.index("--config") :])
    elif words[:3] == ["python", "-m", "benchmarks"]:
        parse_recipe(getattr(parse_benchmark(words[3:]), "recipe_arguments", []))
    elif words[:3] == ["python", "-m", "shards"]:
        shards_parser().parse_args(words[3:])
    elif words[:2] == ["dist-train", "train"]:
        parse_recipe([word for word in words[2:] if word not in ("--dry-run", "--help")])
    elif words[0] == "dist-train" and words[1] != "doctor":
        _command_parser().parse_args(words[1:])
    for word in words:
        if word.startswith(("launch/", "benchmarks/")):
            assert (REPOSITORY / word).is_file(), f"{command}: there is no {word}"


def is_example(command: str) -> bool:
    entry = what_to_do(command)
    return isinstance(entry, Skip) and entry.example


@pytest.mark.parametrize(
    "command", [c for c in commands() if not is_example(c)] + in_prose(), ids=lambda command: command
)
def test_a_command_is_one_that_its_program_takes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    parse(command)


@pytest.mark.launch
@pytest.mark.skipif(not is_activated(), reason="needs make, and runs in a virtual environment")
@pytest.mark.parametrize(
    "documents",
    [("README.md",), pytest.param(DOCUMENTS, marks=pytest.mark.slow)],
    ids=["README", "README and docs"],
)
def test_the_documents_can_be_walked_from_top_to_bottom_in_a_fresh_clone(
    documents: tuple[str, ...], tmp_path: Path
) -> None:
    """Each command ends well and leaves what it is to leave; later ones find what earlier ones made."""
    folder = clone(tmp_path)
    photos(folder)
    script = []
    for command in commands(documents):
        entry = what_to_do(command)
        if isinstance(entry, Run):
            script += [f"echo {shlex.quote('$ ' + command)}", f"{with_more(command, entry.more)} || exit 9"]
            script += [f"test -s {name} || {{ echo {name} is not there; exit 9; }}" for name in entry.makes]
            script += ['echo "  $SECONDS s"']
        elif isinstance(entry, Skip) and not entry.example:
            script += [f"test -e {name} || {{ echo '{command}: no {name}'; exit 9; }}" for name in reads(command)]
    own = str(Path(sys.prefix) / "bin")
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if not part.startswith((own, ".venv")))
    # Without the ranks' variables, which tests before this one may have set.
    variables = {name: value for name, value in environment_of_one_process().items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        # The clone's code, also where this environment has another checkout's; one thread for each of the demo's ranks.
        env=variables | {"PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    (tmp_path / "walk.log").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "Traceback" not in done.stdout


def reads(command: str) -> list[str]:
    """The sets, runs and recipes that a command is given, which must be there when its turn comes."""
    words = shlex.split(command)
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if word.startswith(("data/", "runs/", "launch/")) and before != "--train.run"
    ]


def with_more(command: str, more: str) -> str:
    """Later words win. A redirection stays at the end."""
    program, redirection, file = command.partition(" > ")
    return f"{program} {more}{redirection}{file}"
