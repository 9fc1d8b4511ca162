"""Sequential Monte Carlo: particles that are weighted, copied and moved.

`persistent` keeps every particle that ever was, of whole answers. `steps` is the founding note's scheme on growing
answers, with `repaired` and `seed_variant` its two forms and `scores` what it values. `sequential` is the standard to
hold both against, with and without `twists`. `weights` and `pool` are the arithmetic.

docs/findings/persistent-smc.md has what came of them.
"""

from decodathlon.decoders.smc import persistent, rewards, sequential, steps

__all__ = ["persistent", "rewards", "sequential", "steps"]
