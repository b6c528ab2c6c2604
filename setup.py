"""Builds the native CPU engine. All metadata is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup

# A plain C library, loaded with ctypes: it needs no torch headers, so building needs no torch. `optional`: without a
# compiler the install succeeds and the PyTorch engine runs (`posttrain doctor` says which one it is).
native = Extension(
    "posttrain.kernels.cpu._native",
    sources=sorted(glob("kernels/cpu/*.c")),
    depends=sorted(glob("kernels/cpu/*.h")),
    extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
    optional=True,
)
setup(ext_modules=[native] if native.sources else [])
