"""What reaches the hosts: only names that are names, only variables that are meant, nothing that a shell would run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.cluster.hosts import read_hostfile
from dist_train.errors import UseError
from tests.harness import REPOSITORY


def write_environment(folder: Path, *options: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    (folder / "hostfile").write_text("localhost slots=1\n")
    command = [sys.executable, str(REPOSITORY / "launch" / "environment.py"), str(folder / "hostfile")]
    inherited = {name: os.environ[name] for name in ("PATH",)} | {"HOME": str(folder), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, str(folder / "written"), *options],
        env=inherited | {"GLOO_SOCKET_IFNAME": "eth9"} | variables,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done, folder / "written"


@pytest.mark.parametrize(
    "line", ["node1;reboot slots=1", "-oProxyCommand=id slots=1", "node1", "node1 slots=0", "$(id) slots=1"]
)
def test_a_hostfile_line_that_is_no_name_with_slots_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "hostfile").write_text(f"# ours\nnode0 slots=2  # first\n{line}\n")
    with pytest.raises(UseError, match="hostfile, line 3"):
        read_hostfile(tmp_path / "hostfile")


def test_hosts_keep_the_files_order(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("# ours\nnode2 slots=8\n\nnode1.example slots=4  # small\n")
    assert list(read_hostfile(tmp_path / "hostfile").items()) == [("node2", 8), ("node1.example", 4)]


def test_the_remote_environment_has_what_a_run_needs_no_credentials_and_the_users_own_last(tmp_path: Path) -> None:
    own = tmp_path / ".deepspeed_env"
    own.write_text("\nOMP_NUM_THREADS=3\n\nAWS_PROFILE=mine\n")
    done, file = write_environment(
        tmp_path,
        "--train.timeout_s=90",
        "--dry-run",
        HF_HUB_OFFLINE="1",
        HF_TOKEN="secret",
        AWS_SECRET_ACCESS_KEY="s",
        TORCH_X="$(id)",
    )
    assert (done.returncode, done.stdout.strip()) == (0, "90"), done.stderr
    lines = file.read_text().splitlines()
    assert all("=" in line for line in lines), "the launcher dies of an empty line"
    assert {"GLOO_SOCKET_IFNAME=eth9", "NCCL_SOCKET_IFNAME=eth9", "HF_HUB_OFFLINE=1"} <= set(lines)
    assert lines[-2:] == ["OMP_NUM_THREADS=3", "AWS_PROFILE=mine"]
    assert (
        "secret" not in file.read_text() and "TORCH_X" not in file.read_text() and "AWS_SECRET" not in file.read_text()
    )
    assert own.read_text() == "\nOMP_NUM_THREADS=3\n\nAWS_PROFILE=mine\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: TORCH_X is not passed on") and line.endswith("quote it in ~/.deepspeed_env")


def test_a_host_by_itself_needs_no_network(tmp_path: Path) -> None:
    done, file = write_environment(tmp_path, GLOO_SOCKET_IFNAME="")
    assert done.returncode == 0, done.stderr
    assert {"GLOO_SOCKET_IFNAME=lo", "NCCL_SOCKET_IFNAME=lo"} <= set(file.read_text().splitlines())


@pytest.mark.parametrize("words", [[], ["--config", "launch/recipes/demo.yaml"]])
def test_without_a_hostfile_the_use_is_told(words: list[str]) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [REPOSITORY / "launch" / "multinode.sh", *words]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: use: launch/multinode.sh HOSTFILE --config")


def test_a_shell_without_the_environment_is_told_to_activate_it(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho No module named psutil >&2\nexit 1\n")
    other.chmod(0o755)
    command = [REPOSITORY / "launch" / "multinode.sh", "hosts", "--config", "demo"]
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    said = f"error: multinode.sh: {other} lacks this project's packages; source .venv/bin/activate\n"
    assert done.stderr == said


def test_an_argument_that_a_remote_shell_would_run_is_refused(tmp_path: Path) -> None:
    done, file = write_environment(tmp_path, "--train.run=runs/$(id)")
    assert done.returncode == 2 and "runs/$(id)" in done.stderr and not file.exists()
