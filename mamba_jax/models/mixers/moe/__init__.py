"""Mixtures of experts: every token goes through a few of many perceptrons (arXiv 1701.06538, 2101.03961)."""
