"""Notebook 13's playground: its state (`state`, no widgets) and its controls (`widgets`)."""
