"""A mixer behind a block of attention and MLP that several layers of a model share."""
