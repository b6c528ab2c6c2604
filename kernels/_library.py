"""The torch library that every op here is registered in, as `torch.ops.posttrain.*`.

`Library.define/impl` costs about 7 us a call on a CPU where `custom_op` costs about 20: decoding notices.
"""
import torch

LIBRARY = torch.library.Library("posttrain", "DEF")


def define(schema: str, fake, **engines) -> None:
    """Define an op: its schema, its fake (shapes and dtypes only) and one function per dispatch key (CPU=, CUDA=)."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key, function in engines.items():
        LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"posttrain::{name}", fake, lib=LIBRARY)
