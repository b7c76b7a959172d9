"""Network parts: encoders, heads, global batch norm and losses, each usable on its own."""
