"""What people look at: readers of a run folder, nothing else."""
