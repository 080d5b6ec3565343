"""Runnable examples; the quick one is ``python -m examples.demo``."""
