"""The text of compiled programs, as the compilers of CPUs and of TPUs write it."""

from lora_jax import hlo

# Cut from a program for a TPU: loops say how often they run in their condition alone, halves of
# asynchronous operations repeat their operands, and S(1) is the core's own memory.
TPU = """HloModule jit_step, is_scheduled=true

%fused.1 (param: bf16[4,256]) -> f32[4,256] {
  %param.1 = bf16[4,256]{1,0:T(8,128)} parameter(0)
  ROOT %convert.1 = f32[4,256]{1,0:T(8,128)} convert(%param.1), metadata={op_name="inside"}
}

%condition.1 (arg: (s32[], f32[8,128])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(5)
  %arg.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %get.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt.6 = pred[]{:T(512)} compare(%get.1, %constant.7), direction=LT
}

%body.1 (arg: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %gather.1 = (bf16[2,128]{1,0:T(8,128)}, bf16[4,128]{1,0:T(8,128)}) all-gather-start(%x), metadata={op_name="gather"}
  %gather.2 = bf16[4,128]{1,0:T(8,128)} all-gather-done(%gather.1)
  %near.1 = f32[64,512]{1,0:T(8,128)S(1)} fusion(%y), kind=kLoop, calls=%fused.1, metadata={op_name="near"}
  %made.1 = f32[16,128]{1,0:T(8,128)} fusion(%y), kind=kLoop, calls=%fused.1, metadata={op_name="made"}
  %made.2 = f32[16,128]{1,0:T(8,128)} fusion(%y), kind=kLoop, calls=%fused.1, metadata={op_name="made"}
}

ENTRY %main.1 (w: f32[1024,1024]) -> f32[8,128] {
  %w.1 = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  %while.1 = (s32[], f32[8,128]) while(%tuple.1), condition=%condition.1, body=%body.1
  %sum.1 = (f32[8,128]{1,0}, bf16[8]{0}) all-reduce(%a, %b), metadata={op_name="sum"}
  ROOT %out.1 = bf16[8,128]{1,0:T(8,128)} add(%a, %b), metadata={op_name="out"}
}
"""  # noqa: E501


def test_collectives_count_as_often_as_their_loop_runs():
  gathered, summed = hlo.collectives(TPU)
  assert gathered == ("all-gather", ((4, 128),), 5 * 4 * 128 * 2, "gather")
  assert summed == ("all-reduce", ((8, 128), (8,)), 4 * 8 * 128 + 2 * 8, "sum")
  assert hlo.moved([gathered, summed]) == {"all-gather": 5120, "all-reduce": 4112}


def test_the_largest_arrays_are_those_that_are_made_in_the_devices_memory():
  assert hlo.largest(TPU, 9) == [
    (4 * 16 * 128, "f32[16,128]", "made", 2),
    (2 * 8 * 128, "bf16[8,128]", "out", 1),
  ]
  assert len(hlo.largest(TPU, 1)) == 1
