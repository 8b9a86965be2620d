"""The method `wavefront`: recurrent layers over ranks, time in chunks."""
