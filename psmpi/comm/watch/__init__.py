"""The watch over ranks that stand still: records of operations, heartbeats, and the ranks that others wait for."""
