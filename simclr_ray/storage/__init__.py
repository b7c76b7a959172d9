"""What a run leaves on disk, local or remote."""
