"""Hostile files by the thousand: `python -m psmpi.testing.fuzz` says how psmpi takes them.

`kinds` lists the kinds of files, which `checkpoints`, `arrays` and `known` make by the changes in `mutations`; `worker`
is the process that tries file after file and may be lost, `greedy` has checks that take too much.
"""
