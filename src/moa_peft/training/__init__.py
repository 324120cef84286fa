"""Fine-tuning: recipes, the trainer, checkpoints that survive a kill, and the files of a finished run.

May import: data, mixture.
"""
