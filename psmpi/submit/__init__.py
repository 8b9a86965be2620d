"""Training as jobs of a cluster: what a job asks for, and how a batch system is told."""
