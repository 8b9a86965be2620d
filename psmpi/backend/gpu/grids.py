"""How many blocks a kernel on a GPU is started with."""

# Blocks that fill the largest devices; sums are split over about as many.
BLOCKS = 512


def blocks(size: int, threads: int) -> int:
    """Blocks of so many threads for `size` of them."""
    return -(-size // threads)
