"""Runs in MLflow; imports only errors and config."""
