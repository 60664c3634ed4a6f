"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import result


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results go in place of the committed ones."""
    monkeypatch.setattr(result, "RESULTS", tmp_path / "results")
    return tmp_path / "results"
