"""The cross-layer methods that Depth-Attention is compared with: a folder each, on one mechanism for what layers share.

A folder holds the method's ``definition.py`` (pure: who reads whom, parameters, operations), its ``reference.py`` (the
arithmetic on plain tensors) and its ``layer.py`` (a Megatron layer). docs/methods.md says what a new
method adds.
"""
