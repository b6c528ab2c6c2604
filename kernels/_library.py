"""The torch library that every op here is registered in, as `torch.ops.posttrain.*`.

`Library.define/impl` costs about 7 us a call on a CPU where `custom_op` costs about 20: decoding notices.
"""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

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


def differentiable(name: str, backward, setup_context=None) -> Callable:
    """Registers the gradient of an op. `backward` and `setup_context` are as torch.library.register_autograd takes them, with
    `ctx.needs` for `ctx.needs_input_grad`; lists of tensors are lists there too.

    Returns a function that calls the op and spares it one of two turns through the dispatcher. register_autograd itself looks the
    schema's defaults up in every call, in time that grows with the square of the number of arguments; our schemas have none.
    """
    op = getattr(torch.ops.posttrain, name).default
    gives_list = op._schema.returns[0].type.kind() == "ListType"

    def forward(ctx, lengths, *flat):
        args = _nested(flat, lengths)
        with torch._C._AutoDispatchBelowAutograd():
            result = op(*args)
        if setup_context is not None:
            setup_context(ctx, args, result)
        ctx.lengths = lengths
        return tuple(result) if gives_list else result

    def gradients(ctx, *grads):
        ctx.needs = _nested(ctx.needs_input_grad[1:], ctx.lengths)
        flat: list[torch.Tensor | None] = []
        for grad, length in zip(backward(ctx, *([list(grads)] if gives_list else grads)), ctx.lengths, strict=True):
            flat.extend([grad] if length is None else grad or [None] * length)
        return None, *flat

    # a class of its own: autograd's nodes bear its name
    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), methods)

    def run(*args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if torch.is_grad_enabled():
            flat, lengths = _flat(args)
            if any(isinstance(t, torch.Tensor) and t.requires_grad for t in flat):
                result = function.apply(lengths, *flat)
                return list(result) if gives_list else result
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def call(*args):
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*args)
        return run(*args)

    LIBRARY.impl(name, run, "Autograd")
    return call


def _refuse_tangents(name: str, args) -> None:
    """Below autograd a tangent is lost, and the derivative would be zero."""
    if any(isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in _flat(args)[0]):
        raise RuntimeError(
            f"{name} has no derivative in forward mode (torch.func.jvp, jacfwd, forward_ad): use backward mode, or write it in "
            "PyTorch's own operations"
        )


def _flat(args) -> tuple[list, list[int | None]]:
    """The arguments with those of lists among them, and the lists' lengths; None where there was no list."""
    flat: list = []
    lengths: list[int | None] = []
    for arg in args:
        if isinstance(arg, list):
            flat.extend(arg)
            lengths.append(len(arg))
        else:
            flat.append(arg)
            lengths.append(None)
    return flat, lengths


def _nested(flat, lengths) -> list:
    """`flat` with the next `length` elements as a list for every length that is not None."""
    elements = iter(flat)
    return [next(elements) if length is None else [next(elements) for _ in range(length)] for length in lengths]


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
