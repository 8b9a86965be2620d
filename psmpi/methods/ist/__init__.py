"""The method `ist`: independent subnet training."""
