"""Packaging of mindpet."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mindpet/__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    name="mindpet",
    version=VERSION,
    description="Parameter-efficient fine-tuning (delta tuning) for MindSpore on Ascend NPUs",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mindpet", "mindpet.*"]),
    python_requires=">=3.9,<3.13",
    install_requires=["mindspore>=2.7", "numpy<2", "pyyaml", "tqdm", "safetensors"],
    extras_require={
        "examples": ["tokenizers", "matplotlib"],
        "test": ["pytest", "ruff"],
        "interop": ["torch==2.13.0", "transformers", "peft"],
    },
    entry_points={"console_scripts": ["mindpet=mindpet.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
