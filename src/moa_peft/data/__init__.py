"""Rows, templates, tokens, the packaged demo data and the embedded base model."""
