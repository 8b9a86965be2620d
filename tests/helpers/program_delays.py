"""Train by `dni` with blocks that sleep up to 5 ms before each update; the options are those of psmpi.train."""

import os
import sys
import time

import numpy as np

import psmpi.train
from psmpi.methods.dni.block import Block

RNG, LEARN = np.random.default_rng(os.getpid()), Block.learn


def delayed_learn(self, *arguments):
    time.sleep(float(RNG.uniform(0, 0.005)))
    return LEARN(self, *arguments)


if __name__ == "__main__":
    Block.learn = delayed_learn
    sys.exit(psmpi.train.main())
