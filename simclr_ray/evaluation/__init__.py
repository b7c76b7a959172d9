"""Judging frozen encoders: features, kNN, linear probe, and metrics that need no labels."""
