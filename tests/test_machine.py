"""What is said of this machine and of the code on it."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from dist_train import machine


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_of_this_project_and_not_of_one_around_the_environment_that_it_is_installed_in(
    tmp_path: Path,
) -> None:
    installed = tmp_path / ".venv" / "dist_train" / "machine.py"
    installed.parent.mkdir(parents=True)
    shutil.copy(machine.__file__, installed)
    (tmp_path / ".gitignore").write_text(".venv\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", ".gitignore"], ["commit", "-q", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    ask_git = runpy.run_path(str(installed))["ask_git"]
    assert ask_git("rev-parse", "HEAD") is None
    subprocess.run([*git, "add", "-f", str(installed)], check=True)
    assert len(ask_git("rev-parse", "HEAD")) == 40
