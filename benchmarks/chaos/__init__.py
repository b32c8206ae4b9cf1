"""Breaks what must not break: kills training, takes the store away, gives garbage and malicious files, and counts what is lost.

python -m benchmarks.chaos    # docs/reliability.md says what is promised
"""
