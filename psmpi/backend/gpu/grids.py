"""Sizes of the grids of GPU kernels."""

# Number of blocks that fills the largest devices; sums are split over about as many.
BLOCKS = 512
# Side of the tiles of cuda/turn.cu, and rows of threads for each tile.
SIDE, SIDE_ROWS = 32, 8


def blocks(size: int, threads: int) -> int:
    """The number of blocks of `threads` threads that cover `size` elements."""
    return -(-size // threads)
