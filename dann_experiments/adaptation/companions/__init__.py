"""Losses on target images that combine with any built-in method; each in a file of its own."""
