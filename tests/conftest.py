"""What every test gets: NaN-poisoned `torch.empty`, fixed seeds, two threads at most, and the right process for its marker.

Three kinds of test need a process of their own, since triton decides at import or activation how kernels run; `make test`
starts one for each, and elsewhere they are deselected (never skipped silently: the count of deselected tests shows).
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

OWN_PROCESS = ("interpret", "aot", "emulated", "gpu")

# torch.empty returns NaN (and the largest integer): an output that a kernel leaves unwritten shows.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
torch.set_num_threads(min(2, os.cpu_count() or 1))
settings.register_profile("default", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    # As GPUs and the interpreter since triton 3.8 do: of a number and NaN, tl.maximum and tl.minimum return the number.
    InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _missing(item) -> str | None:
    if item.get_closest_marker("emulated") and importlib.util.find_spec("gpuemu") is None:
        return "gpuemu is not installed"
    if (item.get_closest_marker("interpret") or item.get_closest_marker("aot")) and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "no GPU here"
    return None


def pytest_collection_modifyitems(config, items):
    chosen = config.option.markexpr
    kept, left = [], []
    for item in items:
        own = [m for m in OWN_PROCESS if item.get_closest_marker(m)]
        (left if own and not any(m in chosen for m in own) else kept).append(item)
        if reason := _missing(item):
            item.add_marker(pytest.mark.skip(reason=reason))
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept
