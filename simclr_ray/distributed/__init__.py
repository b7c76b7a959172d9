"""One door to torch.distributed, one to the Ray cluster."""
