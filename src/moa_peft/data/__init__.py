"""Instruction data and base models: rows and their sources, templates, tokens, the user's cache, the demo data.

May import: nothing but the package's top-level files.
"""
