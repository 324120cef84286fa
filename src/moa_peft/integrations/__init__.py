"""Modules that other training tools load by name, so that they train mixtures; each imports its tool.

May import: training, mixture.
"""
