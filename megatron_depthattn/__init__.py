"""Depth-Attention (arXiv:2606.05014) for Megatron-Core: the layer spec, and the stack that trains it."""

__version__ = "0.1.0"
