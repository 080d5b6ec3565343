"""A notebook for each benchmark of the paper."""
