"""How sure predictions are, against other methods: ``python -m examples.uncertainty``."""
