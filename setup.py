"""Packaging of psmpi; build-system and tool settings are in pyproject.toml."""

import re
from pathlib import Path
from zlib import crc32

from setuptools import Extension, find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (here / "psmpi" / "__init__.py").read_text())[1]

EXPORT = ["onnx>=1.16", "onnxruntime>=1.17", "safetensors>=0.4"]
PLOT = ["matplotlib>=3.8"]

# Plain C, loaded by ctypes. Where it cannot be built, NumPy does the work. The number tells a stale library.
SOURCES = sorted((here / "psmpi" / "backend" / "compiled" / "c").glob("*.[ch]"))
text = b"".join(source.read_bytes() for source in SOURCES)
KERNELS = Extension(
    "psmpi.backend.compiled._kernels",
    ["psmpi/backend/compiled/c/kernels.c"],
    depends=[f"psmpi/backend/compiled/c/{source.name}" for source in SOURCES],
    define_macros=[("PSMPI_SOURCE", f"{crc32(text)}u")],
    extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math"],
    optional=True,
)

setup(
    name="psmpi",
    version=version,
    description="Training of partitioned neural networks over MPI: each rank computes its own element losses",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "data/README.md"],
    python_requires=">=3.10",
    packages=find_packages(include=["psmpi", "psmpi.*"]),
    ext_modules=[KERNELS],
    package_data={
        "psmpi.backend.compiled": ["c/*"],
        "psmpi.backend.gpu": ["cuda/*"],
        "psmpi.data": ["*.csv.gz"],
        "psmpi.checkpoint": ["FORMAT.md"],
        "psmpi": ["py.typed"],
    },
    install_requires=[
        "h5py>=3.10",
        "mpi4py>=4.0",
        "numpy>=1.26",
        "rich>=13",
        "threadpoolctl>=3.5",
        "tomli>=2; python_version < '3.11'",
        "tomli-w>=1.0",
        "tyro>=1.0",
    ],
    extras_require={
        "mpi": ["mpich>=4.2"],
        "cuda": ["cupy-cuda13x[ctk]>=14"],
        "cudnn": ["cupy-cuda13x[ctk]>=14", "nvidia-cudnn-cu13>=9.12", "nvidia-cudnn-frontend>=1.14"],
        "export": EXPORT,
        "plot": PLOT,
        "torch": ["torch>=2.4"],
        "test": [
            *("hypothesis>=6", "mypy>=1.10", "pytest>=8", "pytest-timeout>=2.3", "ruff>=0.6", "scipy>=1.11"),
            *EXPORT,
            *PLOT,
        ],
    },
    classifiers=[
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
