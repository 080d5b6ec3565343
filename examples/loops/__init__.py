"""Training loops of other packages, one script each, to be copied."""
