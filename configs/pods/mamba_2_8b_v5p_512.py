"""Mamba-2.8B on a v5p-512, 256 chips of TPU v5p: the run of configs/mamba_2_8b.py.

A batch of 512 sequences is two for each chip. A chip of 95 GB would hold everything, but updating all parameters on
every chip takes longer than gathering them from 64.

Command:   python train.py configs/pods/mamba_2_8b_v5p_512.py --distributed --data.tokenizer.path 20B_tokenizer.json
Hardware:  v5p-512, a slice of 4x8x8 chips with two cores each; the command runs on every host.
Data:      as in configs/mamba_130m.py.
Compiled:  python train.py configs/pods/mamba_2_8b_v5p_512.py --compile-only --topology v5p:4x8x8
Report:    of the compiler and published figures; nothing was run.
  total               5.967 GiB of 95 GiB
  all-gather             389 times    11073.0 MiB
  all-reduce             326 times     2615.4 MiB
  reduce-scatter         192 times     4800.0 MiB
  model operations of a step: 1.757e+16, of a device 6.861e+13, at the peak 149.5 ms
  time of a step: XLA's operations by the compiler's estimate 287.5 ms, kernels by their schedules 102.3 ms,
  exchange at the speed of the links 32.3 ms
  expected between 389.9 and 422.2 ms,
  model FLOPs utilisation at most 38.3%
"""

import dataclasses

from configs.mamba_2_8b import get_config as get_base_config
from mamba_jax.config import ExperimentConfig, MeshConfig


def get_config() -> ExperimentConfig:
    base = get_base_config()
    return dataclasses.replace(
        base,
        name="mamba_2_8b_v5p_512",
        train=dataclasses.replace(base.train, run_dir="runs/mamba_2_8b_v5p_512"),
        mesh=MeshConfig(data=4, fsdp=64),
    )
