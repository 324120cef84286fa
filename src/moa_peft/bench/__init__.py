"""Measurements of speed and memory, in pairs, one row each."""
