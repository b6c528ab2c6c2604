"""posttrain: post-training from the kernel up.

`import posttrain` is light: torch is imported only when something that needs it is.
"""

__version__ = "0.1.0"
