# flextron_mcore in NVIDIA's PyTorch container, with the container's PyTorch, Transformer Engine and apex (docs/containers.md).
#
#   docker build -t flextron .
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" flextron quickstart out=runs/quickstart
#
# setup.py lists the packages to install, constraints.txt their versions.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3

# Wheels of this package and of dependencies that the base lacks. Needs a package index.
FROM ${BASE} AS wheels
WORKDIR /build
COPY setup.py pyproject.toml README.md LICENSE constraints.txt ./
COPY scripts/image_wheels.py scripts/
COPY conf conf
COPY flextron_mcore flextron_mcore
RUN python3 scripts/image_wheels.py . /wheels

FROM ${BASE}

# Without an index and dependencies, pip cannot change a package of the base. The base's PIP_CONSTRAINT is switched off here:
# image_wheels.py has applied it already.
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    PIP_CONSTRAINT="" PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --no-index --no-deps /wheels/*.whl

# Default user of `docker run`. enroot and `docker run --user` run as other users, with any HOME or none, so all may write to
# /workspace.
ARG USER_ID=1000
ARG GROUP_ID=1000
# --non-unique: a user of the base may have the same number, as `ubuntu` has 1000.
RUN groupadd --non-unique --gid "${GROUP_ID}" flextron \
    && useradd --no-log-init --non-unique --uid "${USER_ID}" --gid "${GROUP_ID}" --create-home flextron \
    && install --directory --mode 1777 /workspace /workspace/runs
USER ${USER_ID}:${GROUP_ID}
WORKDIR /workspace

# Check that this user can import the package and start the command. Transformer Engine and apex are hidden from the check, because
# they may not load without a GPU driver, which a build lacks.
RUN python3 -c 'import sys; sys.modules |= {"transformer_engine": None, "apex": None}; \
import megatron.core, flextron_mcore.cli, flextron_mcore.training.loop, flextron_mcore.exports.hf, flextron_mcore.report; \
print("Megatron-Core", megatron.core.__version__)' \
    && flextron --version

# transformers and matplotlib keep files in HOME by default, which may not be writable.
ENV HF_HOME=/tmp/huggingface MPLCONFIGDIR=/tmp/matplotlib

# The entry script of the base image checks the driver first.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "flextron"]
CMD ["--help"]
