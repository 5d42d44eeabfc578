"""Privacy accounting for DP-SGD: what a run spends, proved from public facts alone. Imports neither jax nor dpgemma."""
