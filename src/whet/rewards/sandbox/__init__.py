"""The sandbox: runs Python that nobody has read, in processes that can compute and do nothing else."""
