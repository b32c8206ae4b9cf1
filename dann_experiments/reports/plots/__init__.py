"""Figures, one per file. They take plain data, and write a picture file or return a Matplotlib figure for a page."""
