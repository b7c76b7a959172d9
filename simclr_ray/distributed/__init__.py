"""One door to torch.distributed, one to the Ray cluster and the files that launch it."""
