"""From a config to a trained run on Ray Train."""
