"""Findings 1 and 2 on one source of pictures, with the smallest language model: about 15 minutes on two idle cores.

Three seeds of each setting; a look at the direction of the effects, not at their size.
"""

import dataclasses

import small

from navil_jax.config import SourceConfig
from navil_jax.scaling.grid import Study, grid, union


def get_study() -> Study:
    whole = small.get_study()
    data = dataclasses.replace(
        whole.base.data,
        sources=(SourceConfig("easy_vqa_captions"),),
        visual_slots=50,
        text_slots=288,
        patch_slots=160,
    )
    base = dataclasses.replace(whole.base, steps=192, eval_every=48, data=data)
    language = dataclasses.replace(whole.language, steps=240, data=dataclasses.replace(whole.language.data, rows=4))
    runs = union(
        grid(["s"], [(3, 48)], initialised=(True, False), seeds=(0, 1, 2)),
        grid(["s"], [(3, 48)], experts=(small.ALL, small.FFN, small.NONE), seeds=(0, 1, 2)),
    )
    return dataclasses.replace(whole, name="quick", base=base, language=language, runs=runs)
