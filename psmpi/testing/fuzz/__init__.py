"""A fuzzer: `python -m psmpi.testing.fuzz` makes thousands of hostile files and reports how psmpi handles them.

`kinds` lists the kinds of files. `checkpoints`, `arrays` and `known` make them, with the random changes of `mutations`.
`worker` is the process that opens file after file and may crash. `greedy` has checks that use too much of a resource.
"""
