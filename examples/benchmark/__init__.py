"""What BayesAgg costs: operator calls, time and memory of a step, small and at the paper's shapes.

Run ``python -m examples.benchmark --help``.
"""
