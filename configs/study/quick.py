"""Findings 1 and 2 alone: the runs of small.py with its middle language model and one encoder, three seeds of each."""

import dataclasses

import small

from navil_jax.study.grid import Study, grid, union


def get_study() -> Study:
    whole = small.get_study()
    runs = union(
        grid(["m"], [(3, 64)], initialised=(True, False), seeds=(0, 1, 2)),
        grid(["m"], [(3, 64)], experts=(small.ALL, small.FFN, small.NONE), seeds=(0, 1, 2)),
    )
    return dataclasses.replace(whole, name="quick", runs=runs)
