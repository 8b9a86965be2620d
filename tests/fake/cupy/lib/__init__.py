"""cupy.lib.stride_tricks."""


class stride_tricks:
    @staticmethod
    def as_strided(x, shape=None, strides=None):
        from numpy.lib.stride_tricks import as_strided

        import cupy

        return cupy.ndarray(as_strided(x._a, shape, strides))
