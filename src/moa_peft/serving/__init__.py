"""Serving mixtures: an OpenAI-compatible server, and vLLM's plug-in.

May import: official, evaluation, data, mixture.
"""
