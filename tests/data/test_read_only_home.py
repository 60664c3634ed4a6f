"""The CPU pipeline for a user who can write neither beside the code nor at home, as in a container."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.data.pipeline import _own_temporary_folder
from tests.harness import REPOSITORY


def test_the_compiled_passes_are_kept_among_the_temporary_files_where_nothing_else_can_be_written(
    tmp_path: Path,
) -> None:
    code, temporary = tmp_path / "code", tmp_path / "temporary"
    shutil.copytree(REPOSITORY / "dist_train", code / "dist_train", ignore=shutil.ignore_patterns("__pycache__"))
    (code / "dist_train" / "data" / "__pycache__").write_text("a file here keeps even root from writing\n")
    temporary.mkdir()
    variables = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", "from dist_train.data.pipeline import load_compiled_passes as load; load()"],
        env=variables | {"HOME": "/dev/null", "TMPDIR": str(temporary), "PYTHONPATH": str(code)},
        cwd=code,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((temporary / f"dist-train-{os.getuid()}").rglob("*.nbi"))


def test_compiled_code_is_never_kept_where_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / f"dist-train-{os.getuid()}"
    assert _own_temporary_folder() == own and own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    assert _own_temporary_folder() != own
