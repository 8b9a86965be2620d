"""Spatial domains and parts of sparse networks on ranks, with halos between them."""
