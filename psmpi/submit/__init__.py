"""Training as jobs of a cluster: the resources of a job, and its script for a batch system."""
