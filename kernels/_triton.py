"""triton, or a stand-in that lets the kernel files be imported where triton is not installed (macOS, for one).

The stand-in can decorate a kernel and be named in annotations; nothing in it can run. The CPU engine needs no triton.
"""
try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ModuleNotFoundError:

    class _Absent:
        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return args[0] if args and callable(args[0]) else self

    triton = tl = _Absent()
    HAS_TRITON = False

__all__ = ["HAS_TRITON", "tl", "triton"]
