"""Files whoever made them: a look at them in another process, HDF5 that stays in its file, writing whole or not at all.

`examiner` asks the other process, which is `examining`; `hdf5` says which objects of an HDF5 file may be read, `packed`
reads what gzip packs with a bound on what comes out, `rows` reads rows of JSON, and `whole` writes files.
"""
