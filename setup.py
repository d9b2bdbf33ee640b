"""Maps the top-level folders into one namespace: `kd/` is imported as `dalikd.kd`, and so on."""

from setuptools import find_packages, setup

ROOMS = ("pipelines", "trainers", "kd", "tools")

setup(
    name="dalikd",
    version="0.1.0",
    description="High-throughput knowledge distillation on NVIDIA DALI",
    long_description=open("README.md", encoding="utf-8").read(),  # noqa: SIM115, PTH123
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[
        *(
            "dalikd." + name
            for name in find_packages(include=[room + suffix for room in ROOMS for suffix in ("", ".*")])
        ),
        "dalikd.configs",
    ],
    package_dir={"dalikd." + room: room for room in (*ROOMS, "configs")},
    package_data={"dalikd.configs": ["**/*.yaml", "**/*.txt"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "torchvision>=0.26",
        "nvidia-dali-cuda120>=2.4,<3",
        "timm>=1.0.15",
        "accelerate>=1.6",
        "numpy>=1.26",
        "scipy>=1.11",
        "jsonargparse[signatures]>=4.49",
        "safetensors>=0.4",
        "tqdm>=4.66",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "scikit-learn>=1.4",
        "pillow>=10",
        "psutil>=5.9",
        "pyyaml>=6",
        "setuptools",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.9", "basedpyright>=1.28", "setuptools>=70.1"],
        "dev": ["pre-commit>=4"],
    },
    entry_points={"console_scripts": ["dalikd = dalikd.tools.main:main"]},
)
