"""The official code's checkpoints: their names and layouts, import, export, and numerical parity.

May import: evaluation, training, data, mixture.
"""
