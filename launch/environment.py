"""What launch/multinode.sh needs before the launcher starts: the environment of the remote ranks, and the time-out.

python launch/environment.py HOSTFILE FILE --config launch/recipes/demo.yaml [--section.key value ...]

writes FILE in the form of .deepspeed_env (NAME=VALUE a line), with what the users' own .deepspeed_env say at its end,
where it wins, and prints train.timeout_s in whole seconds.
"""

import os
import re
import socket
import sys
from pathlib import Path

import psutil

from dist_train.cluster.hosts import read_hostfile
from dist_train.errors import UseError, run_command
from dist_train.files import write_atomically
from dist_train.parse import parse_training

# Never credentials: the launcher logs the command line that carries these.
PASSED_ON = re.compile(
    r"(PATH|LD_LIBRARY_PATH|DS_ACCELERATOR|OMP_\w+|(GLOO|TORCH|DALI)_\w+|XDG_CACHE_HOME|"
    r"HF_(HOME|HUB_OFFLINE|HUB_CACHE|ENDPOINT)|TRANSFORMERS_OFFLINE)"
)
OF_A_SHELL = re.compile(r"[^\w@%+=:,./\[\]~ -]")


def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or arguments[0][:1] in ("", "-"):  # which launch/multinode.sh passes on where it has none
        raise UseError("use: launch/multinode.sh HOSTFILE --config RECIPE [--section.key value ...]")
    hosts = read_hostfile(Path(arguments[0]))
    recipe = parse_training(arguments[2:]).recipe
    for argument in arguments[2:]:
        if OF_A_SHELL.search(argument):
            raise UseError(
                f"{argument!r} would pass through a shell on the way to the hosts; put it into a recipe file"
            )
    variables = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    interface = variables.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME") or find_interface(hosts)
    threads = max(1, len(os.sched_getaffinity(0)) // max(hosts.values()))
    variables = {"OMP_NUM_THREADS": str(threads), "NCCL_SOCKET_IFNAME": interface} | variables
    variables["GLOO_SOCKET_IFNAME"] = interface
    for name in [name for name, value in variables.items() if OF_A_SHELL.search(value)]:
        print(
            f"warning: {name} is not passed on, as a shell would read it otherwise; quote it in ~/.deepspeed_env",
            file=sys.stderr,
        )
        del variables[name]
    lines = [f"{name}={value}" for name, value in variables.items()]
    own = [Path.home() / ".deepspeed_env", Path(".deepspeed_env")]
    lines += [line.strip() for file in own if file.is_file() for line in file.read_text().splitlines() if "=" in line]
    write_atomically(Path(arguments[1]), "".join(f"{line}\n" for line in lines).encode())
    print(int(recipe.train.timeout_s))


def find_interface(hosts: dict[str, int]) -> str:
    """The network interface of this host on the way to the others. Their interfaces must have the same name."""
    for host in hosts:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host, 9))  # sends nothing
                address = probe.getsockname()[0]
        except OSError as error:
            raise UseError(f"{host}: no way there ({error}); correct its name or the hostfile") from None
        for name, entries in psutil.net_if_addrs().items():
            if name != "lo" and address in [entry.address for entry in entries]:
                return name
    if len(hosts) == 1:  # this one, by a name such as localhost
        return "lo"
    raise UseError("no interface leads to the hosts; set GLOO_SOCKET_IFNAME to the one between them")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
