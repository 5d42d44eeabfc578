"""Sweeps, scaling-law fits and benchmarks, on top of dpgemma and accounting."""
