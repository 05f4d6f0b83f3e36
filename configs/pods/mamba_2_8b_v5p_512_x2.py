"""Mamba-2.8B on two slices of v5p-512 that a data-centre network joins: the run of configs/mamba_2_8b.py.

A batch of 512 sequences is one for each chip. Only sums of gradients cross the network: of a chip's part of them, since
they are split over 64 chips of a slice before.

Command:   python train.py configs/pods/mamba_2_8b_v5p_512_x2.py --distributed --data.tokenizer.path 20B_tokenizer.json
Hardware:  two slices v5p-512 of 4x8x8 chips each; the command runs on every host of both.
Data:      as in configs/mamba_130m.py.
Compiled:  python train.py configs/pods/mamba_2_8b_v5p_512_x2.py --compile-only --topology v5p:4x8x8 --num-slices 2
Report:    of the compiler and published figures; nothing was run.
  total               4.602 GiB of 95 GiB
  all-gather             583 times    11163.4 MiB
  all-reduce             327 times     3086.3 MiB
  reduce-scatter         256 times     4825.0 MiB
  between slices:
  all-reduce             387 times       85.9 MiB
  model operations of a step: 1.757e+16, of a device 3.431e+13, at the peak 74.7 ms
  time of a step: XLA's operations by the compiler's estimate 160.3 ms, kernels by their schedules 51.2 ms,
  exchange at the speed of the links 33.3 ms, between slices 14.4 ms
  expected between 211.5 and 259.2 ms,
  model FLOPs utilisation at most 35.3%
"""

import dataclasses

from configs.pods.mamba_2_8b_v5p_512 import get_config as get_one_slice_config
from mamba_jax.config import ExperimentConfig, MeshConfig


def get_config() -> ExperimentConfig:
    base = get_one_slice_config()
    return dataclasses.replace(
        base,
        name="mamba_2_8b_v5p_512_x2",
        train=dataclasses.replace(base.train, run_dir="runs/mamba_2_8b_v5p_512_x2"),
        mesh=MeshConfig(data=8, fsdp=64),
    )
