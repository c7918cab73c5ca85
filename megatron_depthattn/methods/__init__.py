"""The cross-layer methods that Depth-Attention is compared with: a folder each, on one mechanism for what layers share.

A folder holds the method's ``definition.py`` (pure: who reads whom, parameters, operations), its ``reference.py`` (the
arithmetic on plain tensors) and its ``layer.py`` (a Megatron layer). A new method adds a folder, a line in
`definitions.py` and a line in ``model/layer_specs.py``.
"""
