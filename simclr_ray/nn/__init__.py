"""Encoders, heads, losses, batch norm, and how config builds them."""
