"""Parts of the benchmark of generation."""
