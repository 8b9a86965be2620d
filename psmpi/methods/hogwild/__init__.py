"""The method `hogwild`: updates of shared weights without locks."""
