"""DenseFormer: a learned weighted average over the outputs of all earlier blocks (arXiv:2402.02622)."""
