"""Makes Triton's interpreter fast enough for whole vocabularies: its sorting takes the xor of elements one by one."""

import pytest


@pytest.fixture(autouse=True, scope="package")
def _xor_by_numpy():
    import torch

    if torch.cuda.is_available():
        yield
        return
    numpy = pytest.importorskip("numpy")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from triton.language import standard

    slow = interpreter.ReduceOps.generic_reduce

    def reduce(self, input):
        if self.combine_fn is not getattr(standard, "_xor_combine", None) or self.axis is None:
            return slow(self, input)
        data = numpy.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return (self.to_tensor(data, input[0].dtype),)

    interpreter.ReduceOps.generic_reduce = reduce
    yield
    interpreter.ReduceOps.generic_reduce = slow
