"""A stand-in for tensorboardX: the few names psmpi uses; events are lines of JSON."""
