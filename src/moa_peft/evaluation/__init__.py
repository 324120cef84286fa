"""Evaluation: likelihoods of choices, greedy answers, what a text states, and results that can be trusted."""
