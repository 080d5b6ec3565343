"""Comparison of multi-task methods: benchmarks, methods, tuning, statistics (docs/comparisons.md).

A benchmark is a ``Source`` in ``benchmarks/``, a method one entry of ``catalogue.methods``.
"""
