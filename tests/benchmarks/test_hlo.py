# ruff: noqa: E501 -- lines as XLA writes them
"""The costs that benchmarks/hlo.py reads from a compiled program, against sums by hand."""

from __future__ import annotations

import hlo

TEXT = """HloModule jit_f, is_scheduled=true

FileNames
1 "/home/x/mrcnn_jax/ops/roi.py"
2 "/home/x/site-packages/flax/linen.py"

FunctionNames
1 "roi_align.<locals>.one"
2 "apply"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=2 end_column=38}
2 {file_name_id=2 function_name_id=2 line=99 end_line=99 column=2 end_column=38}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused_slice (p.0: f32[100,8]) -> f32[10,8] {
  %p.0 = f32[100,8]{1,0} parameter(0)
  ROOT %slice.1 = f32[10,8]{1,0} slice(%p.0), slice={[0:10], [0:8]}
}

%gemm (p.1: bf16[10,8], p.2: bf16[8,4]) -> f32[10,4] {
  %p.1 = bf16[10,8]{1,0} parameter(0)
  %p.2 = bf16[8,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[10,4]{1,0} dot(%p.1, %p.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (s: (f32[6])) -> (f32[6]) {
  %s = (f32[6]{0}) parameter(0)
  %element = f32[6]{0} get-tuple-element(%s), index=0
  %twice = f32[6]{0} copy(%element)
  ROOT %t = (f32[6]{0}) tuple(%twice)
}

%condition (s.1: (f32[6])) -> pred[] {
  %s.1 = (f32[6]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: f32[100,8], b: bf16[10,8], c: bf16[8,4], d: f32[6], e: bf16[1,6,6,3], k: bf16[5,3,3,3]) -> f32[10,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %b = bf16[10,8]{1,0} parameter(1)
  %c = bf16[8,4]{1,0} parameter(2)
  %d = f32[6]{0} parameter(3)
  %e = bf16[1,6,6,3]{3,2,1,0} parameter(4)
  %k = bf16[5,3,3,3]{3,2,1,0} parameter(5)
  %part = f32[10,8]{1,0} fusion(%a), kind=kLoop, calls=%fused_slice, metadata={op_name="f/slice" stack_frame_id=2}
  %product = f32[10,4]{1,0} fusion(%b, %c), kind=kCustom, calls=%gemm, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %start = (f32[6]{0}) tuple(%d)
  %loop = (f32[6]{0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %conv = (bf16[1,6,6,5]{3,2,1,0}, u8[0]{0}) custom-call(%e, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  ROOT %out = f32[10,8]{1,0} copy(%part)
}
"""


def test_kernels_have_the_bytes_and_operations_of_a_sum_by_hand() -> None:
    module = hlo.parse(TEXT)
    slice_, product, in_loop, convolution, copy = hlo.kernels(module)
    # A slice reads what it takes of its operand, not the whole.
    assert (slice_.kind, slice_.read, slice_.written) == ("Loop", 320, 320)
    assert module.source(slice_.instruction) == "ops/roi.py:12 one"  # not the library inside of it
    assert (product.kind, product.flops) == ("__triton_gemm", 2 * 10 * 4 * 8)
    assert (product.bytes, product.types) == (2 * (80 + 32) + 4 * 40, "bf16")
    assert (in_loop.kind, in_loop.bytes, in_loop.times) == ("copy", 48, 7)
    # Each of 36 cells of the output by a kernel of 5 x 3 x 3 x 3.
    assert (convolution.flops, convolution.types) == (2 * 36 * 135, "bf16")
    assert convolution.bytes == 2 * (108 + 135 + 180)
    assert copy.bytes == 640
    assert hlo.flops(module) == product.flops + convolution.flops
    # Moved at 1 GB/s, or multiplied at 1 Gflop/s, in bfloat16; at least a launch.
    assert convolution.seconds(1e12, 1e9) == convolution.flops / 1e9
    assert copy.seconds(1e7, 1e9) == 640 / 1e7
    assert in_loop.seconds(1e12, 1e12) == 7 * hlo.LAUNCH
