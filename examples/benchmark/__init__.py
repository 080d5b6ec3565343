"""What BayesAgg costs: time and memory at the paper's four shapes and at a small one.

Run ``python -m examples.benchmark --help``.
"""
