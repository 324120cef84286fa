"""Speed and memory: paired measurements, one row each.

May import: data, mixture.
"""
