"""Hostile input: readers are given files that were valid once, and must take or refuse them in one sentence.

    python -m tests.fuzzing                       every reader for a minute in all
    python -m tests.fuzzing --seconds=3600        for an hour
    python -m tests.fuzzing --only=safetensors    one of them

Hypothesis changes a valid file byte by byte, or a value of its JSON, and shrinks what fails. A reader may return, or
raise InputError or OSError, which the program prints as one sentence. Anything else is a crash; an input that takes
more than ten seconds is a hang; and a process may not take more than a gibibyte of addresses beyond what it has when
its reader was loaded, so that no length in a header is believed. Inputs have at most 64 KiB.
"""
