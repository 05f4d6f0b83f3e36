"""Experiments of the papers: sets of configs that are trained, judged and compared with published results."""
