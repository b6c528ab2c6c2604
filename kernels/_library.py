"""The torch library that every op here is registered in, as `torch.ops.posttrain.*`.

`Library.define/impl` costs about 7 us a call on a CPU where `custom_op` costs about 20: decoding notices.
"""

import torch

LIBRARY = torch.library.Library("posttrain", "DEF")


def define(schema: str, fake, **engines) -> None:
    """Define an op: its schema, its fake (shapes and dtypes only) and one function per dispatch key (CPU=, CUDA=).

    Under torch.autocast an op computes in the dtypes that it is given, as its fake says; without a rule of its own autocast would
    stay on inside it, and some of the products there would come out in another dtype than the buffers they go to.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key, function in engines.items():
        LIBRARY.impl(name, function, key)
        LIBRARY.impl(name, _without_autocast(name, key.lower()), f"Autocast{key}")
    torch.library.register_fake(f"posttrain::{name}", fake, lib=LIBRARY)


def _without_autocast(name: str, device_type: str):
    def redispatch(*args):
        with torch.autocast(device_type, enabled=False):
            return getattr(torch.ops.posttrain, name)(*args)

    return redispatch
