"""Training of drafters, with nothing but the model that they draft for: `decodathlon draft train`.

`corpus` has the model write texts, `features` keeps the hidden states that it has in them, `prepare` does both for a
folder. `trainer` is the loop, which can be left and taken up. `distillation` repairs drafters that are made of the
model's own matrices, by `repair`; other methods are with their decoders.
"""

from decodathlon.decoders.training import distillation

__all__ = ["distillation"]
