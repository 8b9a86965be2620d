"""Safe reading of files that a stranger may have made, and writing of files complete or not at all.

`examiner` lets another process, `examining`, open a file first. `hdf5` checks which objects of an HDF5 file may be
read, `packed` unpacks gzip with a bound on the result, `rows` reads rows of JSON, and `whole` writes files.
"""
