"""The method: experts, routers, their one forward pass, and the PEFT tuner that hooks them into a model's blocks.

May import: nothing but the package's top-level files.
"""
