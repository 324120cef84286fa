"""Evaluation: tasks, likelihoods, generated answers and how they are read, programs in a sandbox, result rows.

May import: data, mixture.
"""
