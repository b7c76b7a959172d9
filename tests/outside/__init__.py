"""Components that a user would write; `own_components` is imported as a file of its own."""
