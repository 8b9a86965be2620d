"""What each rank does, and the naming of ranks that stand still: records, heartbeats, and who waits for whom."""
