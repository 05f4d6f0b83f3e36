"""AdamW with the recipe of the Mamba paper."""

import optax

from mamba_jax.config import CosineSchedule, OptimizerConfig
from mamba_jax.models.parameters import Params


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of update `count`, counted from 0.

    The warm-up starts above zero, so that the first update is not lost, and the last update has `final_lr`.

    Args:
        config: peak and shape.
        num_steps: updates of the whole run.
    """
    schedule = config.schedule
    warmup = round(schedule.warmup_fraction * num_steps)
    if isinstance(schedule, CosineSchedule):
        after_warmup = optax.cosine_decay_schedule(
            config.peak_lr, max(num_steps - warmup, 1), alpha=schedule.final_lr / config.peak_lr
        )
        pieces, boundaries = [after_warmup], []
    else:
        decay = round(schedule.decay_fraction * num_steps)
        stable = optax.constant_schedule(config.peak_lr)
        falling = optax.linear_schedule(config.peak_lr, schedule.final_lr, max(decay, 1))
        pieces, boundaries = [stable, falling], [num_steps - decay]
    if warmup:
        pieces = [optax.linear_schedule(0.0, config.peak_lr, warmup), *pieces]
        boundaries = [warmup, *boundaries]
    joined = optax.join_schedules(pieces, boundaries)
    return lambda count: joined(count + 1)


def make_optimizer(config: OptimizerConfig, *, num_steps: int, decay: Params) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW.

    Args:
        config: the recipe.
        num_steps: updates of the whole run.
        decay: tree of booleans, True where weight decay applies.

    Source: arXiv 2312.00752, appendix E.2.1; AdamW is arXiv 1711.05101.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay,
        ),
    )
