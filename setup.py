"""Installation. The CPU profile's exact versions are in requirements/cpu.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_flowrl" / "__init__.py").read_text())[1]

setup(
    name="megatron-flowrl",
    version=VERSION,
    description="Train a language model to sample answers in proportion to their reward, at Megatron scale",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_flowrl", "megatron_flowrl.*"]),
    package_data={"megatron_flowrl.planning": ["*.yaml", "README.md"]},
    python_requires=">=3.11",
    install_requires=[
        "aiohttp>=3.10",
        "megatron-core>=0.16.1",
        "psutil",
        "pyarrow>=18",
        "pydantic>=2.11",
        "PyYAML>=6.0",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboard>=2.18",
        "torch>=2.9",
        "tqdm",
        "transformers>=5.16,<5.20",
    ],
    extras_require={
        "cpu": [
            "megatron-core==0.16.1; python_version < '3.12'",
            "megatron-core==0.19.2; python_version >= '3.12'",
            "torch==2.13.0",
        ],
        # Inside NVIDIA's PyTorch container, whose torch satisfies the requirement above. NVIDIA's Apex is built from
        # source and optional; the `apex` of the Python package index is another project.
        "gpu": ["transformer-engine[pytorch]>=2.8"],
        "report": ["matplotlib>=3.9"],
        "hub": ["datasets>=3"],
        # Graders.
        "math": ["math-verify==0.9.0"],
        "reasoning-gym": ["reasoning-gym==0.1.25"],
        "dev": ["hypothesis", "mypy", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "types-PyYAML"],
    },
    entry_points={
        "console_scripts": ["megatron-flowrl = megatron_flowrl.cli:main"],
        # vLLM's processes load it: it names the transfer engines of megatron_flowrl/rollout/transfer.
        "vllm.general_plugins": ["megatron_flowrl = megatron_flowrl.rollout.transfer.plugin:register"],
    },
)
