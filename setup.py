"""Maps the top-level folders into one namespace: `kd/` is imported as `dalikd.kd`, and so on."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

WANDB, SLURM, S3 = "wandb>=0.19.11", "submitit>=1.5", "botocore>=1.34"
ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]  # of them torch's exporter needs the first and the last
ROOMS = ("pipelines", "trainers", "kd", "tools")


class BuildWithMain(build_py):
    """Adds `__main__.py` to the namespace. Named in `py_modules` it would make the namespace a package."""

    def finalize_options(self) -> None:
        """For a wheel: a module of this command alone."""
        super().finalize_options()
        self.py_modules, self.package_dir = ["dalikd.__main__"], {**(self.package_dir or {}), "dalikd": ""}

    def run(self) -> None:
        """For an editable install: one more name that its finder maps to a file."""
        super().run()
        if self.editable_mode:
            self.distribution.packages = [*self.distribution.packages, "dalikd.__main__"]
            self.distribution.package_dir["dalikd.__main__"] = "__main__"


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
    cmdclass={"build_py": BuildWithMain},
    package_data={"dalikd.configs": ["**/*.yaml", "**/*.txt"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "torchvision>=0.26",
        # The code works with 2.2 to 2.4. From 2.3 on DALI brings nvImageCodec 0.9, whose decoding of JPEG windows ends
        # the process on some GPUs (H100, B200) and fails on others (A100): until a later nvImageCodec decodes them.
        "nvidia-dali-cuda120>=2.2,<2.3",
        "timm>=1.0.26",
        "accelerate>=1.6",
        "numpy>=1.26",
        "scipy>=1.11",
        "jsonargparse[signatures]>=4.52",
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
        "onnx": ONNX,
        "slurm": [SLURM],
        "test": [
            *("pytest>=8", "pytest-xdist>=3.7", "ruff>=0.9", "basedpyright>=1.28", "setuptools>=70.1"),
            *(*ONNX, WANDB, SLURM, S3),
        ],
        "dev": ["pre-commit>=4"],
        "docs": ["mkdocs-material>=9.5,<10"],
        "wandb": [WANDB],
        "trackio": ["trackio>=0.2", "accelerate>=1.11"],
        "mlflow": ["mlflow>=2.10"],
        "s3": [S3],
        "gcs": ["google-auth[requests]>=2.20"],
    },
    entry_points={"console_scripts": ["dalikd = dalikd.tools.main:main"]},
)
