"""Mixtures of heterogeneous adapters as a PEFT method."""

__version__ = "0.1.0"
