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
    install_requires=[
        "mindspore>=2.7,<2.11",
        "numpy>=1.21,<2",
        "pyyaml>=5.4,<7",
        "tqdm>=4.60,<5",
        "safetensors>=0.4,<1",
    ],
    extras_require={
        "examples": ["tokenizers>=0.15,<0.24", "matplotlib>=3.5,<4"],
        "test": ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.100,<7", "ruff>=0.17,<0.18"],
        # What they compute and name is compared, and changes with their minor versions.
        "interop": ["torch>=2.13,<2.14", "transformers>=5.23,<5.24", "peft>=0.21,<0.22"],
    },
    entry_points={"console_scripts": ["mindpet=mindpet.__main__:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
