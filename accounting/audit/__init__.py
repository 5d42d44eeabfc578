"""Checks of a run by someone who does not trust it. Reads files and plain dicts; imports neither jax nor dpgemma."""
