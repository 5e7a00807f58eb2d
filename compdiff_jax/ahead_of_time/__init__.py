"""Compiling a run's program for hardware that is not here, and reading what the compiler says about it."""
