"""The method `dni`: decoupled neural interfaces, blocks of layers that update at once from synthetic gradients."""
