"""Serving mixtures: an OpenAI-compatible server, vLLM's plug-in, and the folder that vLLM takes.

May import: official, evaluation, data, mixture.
"""
