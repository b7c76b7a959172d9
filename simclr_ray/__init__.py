"""simclr_ray: SimCLR (Chen et al. 2020) as a distributed training system."""
