"""Figures, one per file. Plain data in; a picture file, or a Matplotlib figure for a page, out."""
