"""First-order update rules, one rule in each file."""
