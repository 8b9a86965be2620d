"""The C extension; everything else about the package is in pyproject.toml."""

from pathlib import Path
from zlib import crc32

from setuptools import Extension, setup

# Plain C, loaded by ctypes. Where it cannot be built, NumPy does the work. The number tells a stale library.
SOURCES = sorted((Path(__file__).parent / "psmpi" / "backend" / "compiled" / "c").glob("*.[ch]"))
text = b"".join(source.read_bytes() for source in SOURCES)
KERNELS = Extension(
    "psmpi.backend.compiled._kernels",
    ["psmpi/backend/compiled/c/kernels.c"],
    depends=[f"psmpi/backend/compiled/c/{source.name}" for source in SOURCES],
    define_macros=[("PSMPI_SOURCE", f"{crc32(text)}u")],
    extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math"],
    optional=True,
)

# With a folder named, an editable install is a path file, which goes before the folder that Python is started in: the
# one above a checkout called psmpi has a psmpi too. Without it is an import hook, which comes after.
setup(ext_modules=[KERNELS], package_dir={"": "."})
