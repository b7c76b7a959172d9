"""Launch files of clusters: what one says, and what is wrong with it before anyone pays for it.

`file` holds what all kinds have in common and `documents` the YAML; `ray_up`, `kuberay` and
`slurm`, each with the files named after it, read theirs into it; `check` holds it against a run.
"""
