"""Fine-tuning a language model with a mixture: recipes, checkpoints that survive a kill, the run itself."""
