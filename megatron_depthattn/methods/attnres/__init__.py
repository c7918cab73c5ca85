"""Attention Residuals in block form: every sublayer reads an attention over depth in place of the residual stream."""
