"""Studies: methods, seeds and tasks on one base model, each method tuned with the same budget; the report.

May import: inspection, evaluation, training, data, mixture.
"""
