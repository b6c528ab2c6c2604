"""Speculative decoding: a cheap draft, verified by the target in one pass; what comes out is distributed as without it."""
