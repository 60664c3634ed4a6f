# docker build -t dist-train .          (any Debian or Ubuntu base with Python 3.11 or newer: --build-arg BASE_IMAGE=...)
ARG BASE_IMAGE=nvidia/cuda:12.8.1-devel-ubuntu24.04
FROM ${BASE_IMAGE}

# g++ and Python's headers: torch.compile builds its kernels at the first run.
# openssh-client and pdsh: the deepspeed launcher starts the other nodes through them.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      python3 python3-venv python3-dev g++ git openssh-client pdsh \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/dist-train
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/venv
COPY . .
# With what the demo ends in: the accuracy that colours alone give.
RUN pip install --editable ".[benchmarks]"
RUN dist-train --help > /dev/null && python -m shards --help > /dev/null
# A container may run as any user (docker run --user), who has no name and no home, and writes here and to /tmp alone.
RUN mkdir -m 1777 data runs
ENV USER=dist-train XDG_CACHE_HOME=/tmp/cache TRITON_HOME=/tmp/cache MPLCONFIGDIR=/tmp/cache/matplotlib
CMD ["dist-train", "--help"]
