"""Mamba-1.4B on a pod of TPU v5e: the run of configs/mamba_1_4b.py.

A batch of 256 sequences is one for each chip. Parameters, gradients and moments of 22 GB do not fit a chip of 16 GB, so
they are split over 64: of 8, 16, 64 and 256 the number with the least time.

Command:   python train.py configs/pods/mamba_1_4b_v5e_256.py --distributed --data.tokenizer.path 20B_tokenizer.json
Hardware:  v5litepod-256, a slice of 16x16 chips; the command runs on every host.
Data:      as in configs/mamba_130m.py.
Compiled:  python train.py configs/pods/mamba_1_4b_v5e_256.py --compile-only --topology v5e:16x16
Report:    of the compiler and published figures; nothing was run.
  total               3.041 GiB of 16 GiB
  all-gather             293 times     5786.4 MiB
  all-reduce             246 times     1896.0 MiB
  reduce-scatter         144 times     2304.0 MiB
  model operations of a step: 4.361e+15, of a device 1.704e+13, at the peak 86.5 ms
  time of a step: XLA's operations by the compiler's estimate 163.9 ms, kernels by their schedules 70.6 ms,
  exchange at the speed of the links 52.4 ms
  expected between 234.5 and 286.8 ms,
  model FLOPs utilisation at most 36.9%
"""

import dataclasses

from configs.mamba_1_4b import get_config as get_base_config
from mamba_jax.config import ExperimentConfig, MeshConfig


def get_config() -> ExperimentConfig:
    base = get_base_config()
    return dataclasses.replace(
        base,
        name="mamba_1_4b_v5e_256",
        train=dataclasses.replace(base.train, run_dir="runs/mamba_1_4b_v5e_256"),
        mesh=MeshConfig(data=4, fsdp=64),
    )
