"""Pictures in: parquet sources, the batch plan, and the two-view stream on Ray Data."""
