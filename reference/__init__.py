"""Slow NumPy oracles that say what is right: float64, explicit loops, equation numbers. They import numpy alone."""
