"""The trained encoder in use: registry, embedding, exports."""
