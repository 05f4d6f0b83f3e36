"""The multilayer perceptron of Transformers, plain and gated (arXiv 1706.03762, 2002.05202)."""
