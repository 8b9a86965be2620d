"""Update rules of first order, one a file."""
