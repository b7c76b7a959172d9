"""Launch files of clusters: what one says, and what is wrong with it before anyone pays for it.

`file` holds what all kinds have in common, `ray_up`, `kuberay` and `slurm` read theirs into it, and
`check` holds it against a run.
"""
