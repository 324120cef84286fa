"""Serving a mixture: vLLM's plug-in, and the folder that vLLM takes.

May import: official, evaluation, data, mixture.
"""
