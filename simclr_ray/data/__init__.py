"""Parquet in, planned batches out, through Ray Data."""
