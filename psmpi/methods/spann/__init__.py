"""The method `spann`: spatial domains, or parts of sparse networks, on ranks, with halos between them."""
