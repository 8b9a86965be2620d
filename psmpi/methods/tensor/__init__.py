"""The method `tensor`: weight matrices and activations cut into tiles on a grid of ranks."""
