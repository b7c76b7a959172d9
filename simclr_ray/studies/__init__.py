"""Studies: what varies, the trials that it takes, and the figure that answers the question."""
