"""Numbers of blocks with which kernels on a GPU are started."""

# Blocks that fill the largest devices; sums are split over about as many.
BLOCKS = 512
# Sides of the tiles of cuda/turn.cu, and their rows of threads.
SIDE, SIDE_ROWS = 32, 8


def blocks(size: int, threads: int) -> int:
    """Blocks of so many threads for `size` of them."""
    return -(-size // threads)
