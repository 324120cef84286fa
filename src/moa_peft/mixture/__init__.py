"""The mixture."""
