"""Starting runs: on this machine, on several hosts, and on SLURM."""
