"""Hostile files by the thousand: `python -m psmpi.testing.fuzz` says how psmpi takes them.

`kinds` makes files of each kind and says what psmpi does with one, `mutations` changes bytes, `worker` is the process
that tries file after file and may be lost.
"""
