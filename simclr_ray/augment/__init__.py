"""Views: what an augmented picture shows is a pure function of (seed, epoch, image id, view)."""
