#!/usr/bin/env bash
# Train on the hosts of a hostfile, through the deepspeed launcher and ssh:
#
#   launch/multinode.sh HOSTFILE --config launch/recipes/grocery.yaml [--section.key value ...] [--resume auto]
#
# Start it on a host that reaches all others through ssh without a password. The project, its environment and the shards
# must be at the same path on every host, and the run folder on a shared file system. The ranks meet at MASTER_PORT
# (29500).
set -euo pipefail
cd "$(dirname "$0")/.."

if ! python -c 'import psutil, jsonargparse' 2>/dev/null; then
  echo "error: multinode.sh: $(command -v python || echo python) lacks this project's packages; source .venv/bin/activate" >&2
  exit 2
fi

# The launcher passes on hardly any variables; it reads the others from this file.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
timeout_s=$(PYTHONPATH=. python launch/environment.py "${1:-}" "$DS_ENV_FILE" "${@:2}")

# ssh alone would wait for a lost host for a quarter of an hour.
export PDSH_SSH_ARGS_APPEND="-o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveCountMax=3 \
-o ServerAliveInterval=$((timeout_s > 15 ? timeout_s / 3 : 5)) ${PDSH_SSH_ARGS_APPEND:-}"

deepspeed --hostfile "$1" --master_port "${MASTER_PORT:-29500}" launch/train.py "${@:2}" &
launcher=$!
trap 'kill -TERM $launcher' TERM INT
status=0
wait $launcher || status=$?
if kill -0 $launcher 2>/dev/null; then wait $launcher || status=$?; fi # a signal interrupted the first wait
exit $status
