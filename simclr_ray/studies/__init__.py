"""A question, its trials on Ray Tune, and the answer."""
