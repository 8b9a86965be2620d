"""Decoupled neural interfaces: blocks of layers that update at once, from gradients that they predict themselves."""
