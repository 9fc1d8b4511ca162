"""The kernels go through Triton's compiler for the GPUs that are promised, which needs no GPU."""

import os
import subprocess
import sys
import textwrap

import pytest

#: Compute capability: RTX 3090, and H100 or H200.
GPUS = [86, 90]


@pytest.mark.parametrize("gpu", GPUS)
def test_the_compiler_takes_them(gpu):
    pytest.importorskip("triton")
    code = textwrap.dedent(
        f"""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from decodathlon.kernels.delta import triton as delta
        from decodathlon.kernels.reservoir import triton as reservoir
        from decodathlon.kernels.sample import triton as sample

        def compiled(kernel, types, **constants):
            names = kernel.arg_names
            signature = {{n: "constexpr" if n in constants else types[n] for n in names}}
            places = {{(names.index(n),): v for n, v in constants.items()}}
            source = ASTSource(fn=kernel, signature=signature, constexprs=places)
            made = triton.compile(source, target=GPUTarget("cuda", {gpu}, 32))
            assert made.asm["ptx"]
            print(kernel.__name__, len(made.asm["cubin"]))

        compiled(
            sample._sample,
            dict(logits="*bf16", keys="*i64", out="*i64", V="i32", stride="i32", inverse_temperature="fp32",
                 top_k="i32", top_p="fp32", log_min_p="fp32"),
            BLOCK=4096, TOP_K=True, TOP_P=True, MIN_P=True,
        )
        # as `step` asks for V = 151,936, and the most likely tokens and slots
        compiled(
            reservoir._survey,
            dict(logits="*bf16", tops="*i64", maxima="*fp32", sums="*fp32", V="i32", stride="i32",
                 inverse_temperature="fp32", PARTS="i32"),
            PART=4096, K=128,
        )
        state = dict(tokens="*i64", before="*fp32", weights="*fp32", greatest="*fp32", age="*i64")
        compiled(
            reservoir._update,
            dict(logits="*bf16", tops="*i64", maxima="*fp32", sums="*fp32", u="*fp64", drawn="*i64", stride="i32",
                 u_stride="i32", inverse_temperature="fp32", PARTS="i32", top_k="i32", R="i32",
                 **state, **{{n + "_out": t for n, t in state.items()}}),
            MERGED=8192, PARTS_UP=64, K=128, SLOTS=128, EVERY=2, CROSS=True, ONE=True, EMPTY=-1,
        )
        planes = dict(code="*u8", first="*u8", second="*u8", middle="*u8", last="*u8", escapes="*u8", before="*i16",
                      spans="*i64", table="*i16", rest="*u8", escape_at="*i32", start="i32", N="i32", out="*i16")
        sizes = dict(x="*i16", y="*fp32", K="i32", bounds="*i32", E="i32") | planes
        for kept in (7, 1):
            compiled(delta._nested_rebuild, planes, KEPT=kept)
            for rows in (1, 8):
                compiled(delta._nested_product, sizes, M=rows, KEPT=kept, PATTERNS=True, ROWS=delta.ROWS)
        compiled(delta._fixed12_rebuild, planes)
        compiled(delta._put_escapes, sizes, BLOCK=256)
        for rows in (1, 8):
            compiled(delta._fixed12_product, sizes, M=rows, PATTERNS=True, ROWS=delta.ROWS, TOGETHER=delta.TOGETHER)
        """
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") == 13
