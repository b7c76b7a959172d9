"""The terminal: verbs, progress, signals, exit codes."""
