"""A SLURM cluster of the two hosts: munge, slurmctld and a slurmd each, with a partition that preempts the other."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.speed.link import PATH
from tests.harness import wait_for
from tests.multinode.two_hosts import Host

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")

# A preempted job has its partition's GraceTime before it is killed, or KillWait where there is none.
_CONFIGURATION = """
ClusterName=two
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
ReturnToService=2
NodeName=node1,node2 CPUs=1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=abrupt Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str | None:
    """Why there can be no cluster here, or None."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    return f"a SLURM cluster needs {', '.join(missing)}: install slurm-wlm and munge" if missing else None


class Cluster:
    """Commands of SLURM, as if typed on the first host."""

    def __init__(self, host: Host, environment: dict[str, str]) -> None:
        self.host = host
        self.environment = environment

    def run(self, *command: str) -> str:
        """What the command prints; raises CalledProcessError where it fails."""
        done = subprocess.run(self.host.command(*command), env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode, ..."""
        return dict(
            word.partition("=")[::2] for word in self.run("scontrol", "--oneliner", "show", "job", number).split()
        )


@contextmanager
def slurm(folder: Path, hosts: tuple[Host, Host], environment: dict[str, str]) -> Iterator[Cluster]:
    """The daemons run in the hosts' namespaces, and end with them."""
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    (folder / "slurm.conf").write_text(_CONFIGURATION.format(folder=folder))
    environment = environment | {"PATH": f"{environment['PATH']}:{PATH}", "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [
        f"--{name}={folder}/munge.{name.split('-')[0]}"
        for name in ("socket", "key-file", "log-file", "pid-file", "seed-file")
    ]
    daemons = [(hosts[0], ["munged", "--foreground", "--force", *munge]), (hosts[0], ["slurmctld", "-D", "-c"])]
    daemons += [(host, ["slurmd", "-D", "-N", host.name]) for host in hosts]
    for host, command in daemons:
        with open(folder / f"{command[0]}-{host.name}.out", "wb") as log:
            subprocess.Popen(host.command(*command), env=environment, stdout=log, stderr=log)
        if command[0] == "munged":
            wait_for((folder / "munge.socket").exists, "munged")
    cluster = Cluster(hosts[0], environment)
    wait_for(
        lambda: cluster.run("sinfo", "--noheader", "--format", "%T %D", "--partition", "low") == "idle 2\n",
        "two idle nodes",
    )
    yield cluster
