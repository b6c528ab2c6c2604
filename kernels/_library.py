"""The torch library that every op here is registered in, as `torch.ops.posttrain.*`.

`Library.define/impl` costs about 7 us a call on a CPU where `custom_op` costs about 20: decoding notices.
"""

import torch

from ._triton import on_device_of

LIBRARY = torch.library.Library("posttrain", "DEF")


def define(schema: str, fake, **engines) -> None:
    """Define an op: its schema, its fake (shapes and dtypes only) and one function per dispatch key (CPU=, CUDA=).

    On a GPU an op runs with its first tensor's device as the current one: triton launches there, and asks it what it is.
    Under torch.autocast an op computes in the dtypes that it is given, as its fake says; without a rule of its own autocast would
    stay on inside it, and some of the products there would come out in another dtype than the buffers they go to.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key, function in engines.items():
        LIBRARY.impl(name, _on_its_device(function) if key == "CUDA" else function, key)
        LIBRARY.impl(name, _without_autocast(name, key.lower()), f"Autocast{key}")
    torch.library.register_fake(f"posttrain::{name}", fake, lib=LIBRARY)


def _on_its_device(function):
    def guarded(first, *rest):
        with on_device_of(first if isinstance(first, torch.Tensor) else first[0]):
            return function(first, *rest)

    return guarded


def _without_autocast(name: str, device_type: str):
    def redispatch(*args):
        with torch.autocast(device_type, enabled=False):
            return getattr(torch.ops.posttrain, name)(*args)

    return redispatch
