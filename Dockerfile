# flextron_mcore in NVIDIA's PyTorch container, on the container's own PyTorch, Transformer Engine and apex.
# Continuous integration has no GPU and does not build this image.
#
#   docker build -t flextron .
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" flextron quickstart out=runs/quickstart
ARG BASE=nvcr.io/nvidia/pytorch:25.09-py3
FROM ${BASE}

# PIP_CONSTRAINT, which the base image sets, keeps the container's packages at their versions.
# --no-deps: Megatron-Core's only dependencies, torch, numpy and packaging, are in the container.
RUN pip install --no-cache-dir \
        "omegaconf>=2.3,<2.4" "hydra-core>=1.3.2,<1.4" safetensors "transformers>=4.57" tokenizers \
        psutil tqdm rich matplotlib jinja2 tensorboard \
    && pip install --no-cache-dir --no-deps "megatron-core>=0.16.1,<0.20"

COPY setup.py pyproject.toml README.md LICENSE /opt/flextron_mcore/
COPY conf /opt/flextron_mcore/conf
COPY flextron_mcore /opt/flextron_mcore/flextron_mcore
RUN pip install --no-cache-dir --no-deps /opt/flextron_mcore

RUN useradd --create-home flextron && mkdir -p /workspace/runs && chown -R flextron /workspace/runs
USER flextron
WORKDIR /workspace

# The base image's entry script checks the driver first.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "flextron"]
CMD ["--help"]
