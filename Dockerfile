# flextron_mcore in NVIDIA's PyTorch container, on the container's own PyTorch, Transformer Engine and apex: docs/containers.md.
#
#   docker build -t flextron .
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" flextron quickstart out=runs/quickstart
#
# What is installed follows from setup.py, in the versions of constraints.txt: there is no list of packages here.
ARG BASE=nvcr.io/nvidia/pytorch:25.09-py3

# Wheels of this package and of what it needs beyond what the base has. Needs a package index.
FROM ${BASE} AS wheels
WORKDIR /build
COPY setup.py pyproject.toml README.md LICENSE constraints.txt ./
COPY scripts/image_wheels.py scripts/
COPY conf conf
COPY flextron_mcore flextron_mcore
RUN python3 scripts/image_wheels.py . /wheels

FROM ${BASE}

# No index and no dependencies: nothing of the base can change. Its PIP_CONSTRAINT was respected when the wheels were made.
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    PIP_CONSTRAINT="" PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --no-index --no-deps /wheels/*.whl

# The user of `docker run`. Nothing depends on it: enroot and `docker run --user` run as any other, with any HOME or none.
ARG USER_ID=1000
ARG GROUP_ID=1000
# --non-unique: the base may have given the number to a user of its own, as Ubuntu gives 1000 to `ubuntu`.
RUN groupadd --non-unique --gid "${GROUP_ID}" flextron \
    && useradd --no-log-init --non-unique --uid "${USER_ID}" --gid "${GROUP_ID}" --create-home flextron \
    && install --directory --mode 1777 /workspace /workspace/runs
USER ${USER_ID}:${GROUP_ID}
WORKDIR /workspace

# Imports work for that user, and the command starts. Transformer Engine and apex are left out: a builder has no GPU driver,
# without which they may not load.
RUN python3 -c 'import sys; sys.modules |= {"transformer_engine": None, "apex": None}; \
import megatron.core, flextron_mcore.cli, flextron_mcore.training.loop, flextron_mcore.exports.hf, flextron_mcore.report; \
print("Megatron-Core", megatron.core.__version__)' \
    && flextron --version

# For libraries that keep files in HOME, which may not be writable.
ENV HF_HOME=/tmp/huggingface MPLCONFIGDIR=/tmp/matplotlib

# The base image's entry script checks the driver first.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "flextron"]
CMD ["--help"]
