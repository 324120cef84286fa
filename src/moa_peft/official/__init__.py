"""The official code's checkpoints: their names and layouts, and proof that our numbers are theirs."""
