"""A stand-in for tensorboardX with only the names that psmpi uses. Events are lines of JSON."""
