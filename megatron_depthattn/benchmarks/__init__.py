"""Measurements of parts of the stack: `depthattn benchmark`."""
