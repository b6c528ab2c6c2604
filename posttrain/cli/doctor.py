"""Show which engine runs on this machine, and what it lacks. Changes nothing."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path

HELP = "show which engine runs here and what is missing"
EXAMPLES = """\
examples:
  posttrain doctor
  OMP_NUM_THREADS=1 posttrain doctor
  POSTTRAIN_CACHE=/big/disk posttrain doctor
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # no options


def run(args: argparse.Namespace) -> None:
    facts = inspect_machine()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def inspect_machine() -> dict[str, str]:
    """Facts in the order in which a bug report wants them."""
    import torch

    import posttrain
    from posttrain.cli.common import cache_folder
    from posttrain.kernels.cpu import describe

    engine = describe()
    cache = cache_folder()
    return {
        "posttrain": f"{posttrain.__version__} ({Path(posttrain.__file__).parent})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": str(torch.__version__),
        "triton": _version("triton") or "not installed: GPU kernels are unavailable, the CPU engine works",
        "GPU": _gpu(),
        "CPU engine": f"{engine.pop('engine')} ({', '.join(f'{key} {value}' for key, value in engine.items())})",
        "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()}"
        + (f" (OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']})" if "OMP_NUM_THREADS" in os.environ else ""),
        "CPU features": torch.backends.cpu.get_cpu_capability(),
        "C compiler": _compiler(),
        "memory": _memory(),
        "cache": f"{cache} ({'exists' if cache.is_dir() else 'not there yet'}; set POSTTRAIN_CACHE to move it)",
        "disk": _disk(cache),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    names = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{major}{minor}")
    return "; ".join(names)


def _compiler() -> str:
    named = os.environ.get("CC", "").split()
    for name in (*named[:1], "cc", "gcc", "clang"):
        if path := shutil.which(name):
            return path
    return "none: the native CPU engine cannot be built (install gcc or clang, then reinstall posttrain)"


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def _disk(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f} where the cache lies"
