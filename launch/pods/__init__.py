"""Scripts that put an experiment on a pod: TPU VM slices, GKE with JobSet, Slurm with GPUs.

A platform is one module with a pure function from settings to a `Recipe`: files and commands.
`python -m launch.pods` checks what was asked for, writes the files and runs the commands, or prints
all of it with --dry-run.
"""
