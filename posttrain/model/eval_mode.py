"""A model in eval mode for as long as something generates with it or measures it, then every module as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .fused import layers_change


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """While open, every module of the model is in eval mode. Threads share the model: the last to leave restores each module's own
    mode."""
    with layers_change:
        users, trained = model.__dict__.get("_generating", (0, []))
        trained = trained + [module for module in model.modules() if module.training]
        model.__dict__["_generating"] = users + 1, trained
        for module in trained:
            module.training = False
    try:
        yield
    finally:
        with layers_change:
            users, trained = model.__dict__.pop("_generating")
            if users > 1:
                model.__dict__["_generating"] = users - 1, trained
            else:
                for module in trained:
                    module.training = True
