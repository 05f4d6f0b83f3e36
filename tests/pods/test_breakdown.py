"""Where the time of a compiled step goes, from a program's text, and what is printed of it."""

import dataclasses

import pytest

from mamba_jax.chips import Chip, Cores
from mamba_jax.pods.breakdown import KINDS, InstructionTime, instruction_times
from mamba_jax.pods.hlo import count_instructions
from tests.pods.test_estimate import REPORT

# Lines of a step of two layers, compiled for v5e:2x2 by libtpu 0.0.52, with short names and without what is not read.
# In its loop of 2 turns a gather goes on beside two products; after the loop a sum of which a device keeps its part,
# and an exchange in two halves with work between them.
PROGRAM = """
%fused_start (p: bf16[1,384,48]) -> (bf16[1,384,192]) {
  %all-gather.58 = bf16[1,384,192]{1,2,0:T(8,128)(2,1)} all-gather(%p), channel_id=52, replica_groups=[1,4]<=[4]
  ROOT %custom-call.23 = (bf16[1,384,192]) custom-call(%all-gather.58), custom_call_target="AsyncCollectiveStart"
}
%product (p: bf16[2,256,192]) -> bf16[2,256,384] {
  %multiply.1 = bf16[2,256,192]{2,1,0} multiply(%p, %p)
  ROOT %convolution.8 = bf16[2,256,384]{2,1,0:T(8,128)(2,1)} convolution(%multiply.1, %q), dim_labels=0bf_io0->0bf
}
%async_product (p: bf16[1,384,48]) -> (bf16[2,256,384]) {
  %all-gather.60 = bf16[1,384,192]{1,2,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=52, replica_groups=[1,4]<=[4]
  %fusion.9 = bf16[2,256,384]{2,1,0} fusion(%p), calls=%product
}
%fused_done (p: bf16[1,384,48]) -> bf16[1,384,192] {
  %all-gather.66 = bf16[1,384,192]{1,2,0:T(8,128)(2,1)} all-gather(%p), channel_id=52, replica_groups=[1,4]<=[4]
  ROOT %custom-call.25 = bf16[1,384,192] custom-call(%all-gather.66), custom_call_target="AsyncCollectiveDone"
}
%all-reduce-scatter.4 (p: f32[192,264]) -> f32[48,264] {
  %all-reduce.72 = f32[192,264]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %dynamic-slice.267 = f32[48,264]{1,0} dynamic-slice(%all-reduce.72, %i, %zero), dynamic_slice_sizes={48,264}
}
%stacked (p: bf16[2,256,192]) -> bf16[2,2,256,192] {
  %compare.1 = pred[]{:T(512)} compare(%i, %zero), direction=LT
  %select.1 = s32[]{:T(128)} select(%compare.1, %j, %i)
  %convert.1 = bf16[2,256,192]{2,1,0} convert(%p), {op_name="jit(step)/jvp()/convert"}
  ROOT %dynamic-update-slice.1 = bf16[2,2,256,192]{3,2,1,0} dynamic-update-slice(%q, %convert.1, %select.1)
}
%norm (p: bf16[2,256,192]) -> f32[2,256] {
  %multiply.2 = f32[2,256,192]{2,1,0} multiply(%p, %p)
  ROOT %reduce.1 = f32[2,256]{1,0} reduce(%multiply.2, %zero), dimensions={2}, to_apply=%add
}
%update (p: f32[192,264]) -> f32[192,264] {
  ROOT %multiply.3 = f32[192,264]{1,0} multiply(%p, %q)
}
%condition (p: (s32[])) -> pred[] {
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%p), index=0
  %constant.1 = s32[]{:T(128)} constant(2)
}
%body (p: (s32[])) -> (s32[]) {
  %start = (bf16[1,384,192]{1,2,0}, u32[]{:S(2)}) fusion(%p), calls=%fused_start
  %fusion.248 = f32[8] fusion(%p), calls=%async_product, {op_name="jit(step)/jvp()/dot"}, {"estimated_cycles":"30"}
  %fusion.249 = bf16[2,256,384]{2,1,0} fusion(%p), calls=%product, {"estimated_cycles":"10"}
  %done = bf16[1,384,192]{1,2,0} fusion(%start), calls=%fused_done
  %causal_conv1d_pallas_tpu_forward.1 = bf16[1,64,1024]{2,1,0} custom-call(%p), custom_call_target="tpu_custom_call"
  %fusion.250 = bf16[2,2,256,192]{3,2,1,0} fusion(%p), calls=%stacked, {"estimated_cycles":"7"}
  %fusion.251 = f32[2,256]{1,0} fusion(%p), calls=%norm, {"estimated_cycles":"5"}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[]) while(%p), condition=%condition, body=%body
  %copy.1 = f32[264,192]{0,1} copy(%p), {"estimated_cycles":"3"}
  %fusion.1 = f32[8] fusion(%p), calls=%product, {op_name="jit(step)/jvp(loss)/dot_general"}, {"estimated_cycles":"11"}
  %fusion.2 = f32[8] fusion(%p), calls=%update, {op_name="jit(step)/transpose(jvp())/mul"}, {"estimated_cycles":"4"}
  %fusion.246 = f32[48,264]{1,0} fusion(%p), calls=%all-reduce-scatter.4
  %collective-permute-start.1 = (f32[8,16]{1,0}, f32[8,16]{1,0}) collective-permute-start(%p), channel_id=1
  %fusion.3 = f32[8] fusion(%p), calls=%update, {op_name="jit(step)/optimizer/mul"}, {"estimated_cycles":"6"}
  %collective-permute-done.1 = f32[8,16]{1,0} collective-permute-done(%collective-permute-start.1)
  %sort.1 = s32[4096]{0} sort(%p), dimensions={0}, {"estimated_cycles":"2"}
}
"""
# A cycle is a second, and the gather of 147456 bytes takes 50 of them.
CHIP = Chip(
    peak_flops=1.0,
    link_bytes_per_second=147456 / 50,
    network_bytes_per_second=256.0,
    cores=Cores(clock_hz=1.0, number=1, kernel_cycles={"causal_conv1d_pallas_tpu_forward": 0.5}),
)
SCATTERED = 192 * 264 * 4 * 50 / 147456


def by_kind(times: list[InstructionTime]) -> dict[str, float]:
    return dataclasses.replace(REPORT, times=tuple(times)).seconds_by_kind or {}


def test_every_instruction_has_a_kind() -> None:
    assert by_kind(instruction_times(PROGRAM, CHIP, 1)) == pytest.approx(
        {
            "products": 2 * (30 + 10),
            "reductions": 2 * 5,
            "elementwise": 4,
            # Neither the scalars that find a place nor a cast make a copy into more than that.
            "copies and transposes": 2 * 7 + 3,
            "loss": 11,
            "optimizer": 6,
            "other": 2,
            "kernels": 2 * 64 * 0.5,
            # The gather needs 50 s, of which the products hide 40; nothing hides the sum. The last exchange, of 512
            # bytes, is over before the optimizer's 6 s are.
            "exchanges not hidden": 2 * 10 + SCATTERED,
        }
    )


def test_parts_add_up_to_the_counts() -> None:
    seconds = by_kind(instruction_times(PROGRAM, CHIP, 1))
    counts = count_instructions(PROGRAM, 1)
    assert CHIP.cores is not None
    busy = counts.cycles + CHIP.cores.kernel_seconds(counts.kernel_elements)
    assert sum(seconds.values()) - seconds["exchanges not hidden"] == pytest.approx(busy)
    assert dict(counts.arrived) == {
        "all-gather": 2 * 147456,
        "reduce-scatter": 192 * 264 * 4,
        "collective-permute": 512,
    }


def test_instructions_are_named() -> None:
    times = {part.name: part for part in instruction_times(PROGRAM, CHIP, 1)}
    assert times["fusion.248"].op_name == "jit(step)/jvp()/dot"
    assert times["fusion.250"].op_name == "jit(step)/jvp()/convert", "a cast in it says more than nothing"
    assert times["copy.1"].op_name == ""
    assert (times["fusion.248"].times, times["fusion.1"].times) == (2, 1)


def test_exchanges_share_the_links() -> None:
    """Of two exchanges that begin together, the second has the links when the first is over."""
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %start.1 = (f32[128]{0}, f32[128]{0}) collective-permute-start(%p), channel_id=1
  %start.2 = (f32[128]{0}, f32[128]{0}) collective-permute-start(%p), channel_id=2
  %copy.1 = f32[264,192]{0,1} copy(%p), {"estimated_cycles":"3"}
  %done.1 = f32[128]{0} collective-permute-done(%start.1)
  %done.2 = f32[128]{0} collective-permute-done(%start.2)
}
"""
    chip = dataclasses.replace(CHIP, link_bytes_per_second=256.0)
    waits = {part.name: part.seconds for part in instruction_times(text, chip, 1)}
    assert waits == pytest.approx({"copy.1": 3, "done.2": 2 + 2 - 3})


def test_transfers_between_slices_go_on_beside_work() -> None:
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %recv = (f32[2,128]{1,0}, u32[]{:S(2)}, token[]) recv(%a), _xla_megascale_transfer_type="ALL_REDUCE"
  %copy.1 = f32[264,192]{0,1} copy(%p), {"estimated_cycles":"3"}
  %recv-done = (f32[2,128]{1,0:T(2,128)}, token[]) recv-done(%recv), channel_id=2
}
"""
    waits = {part.name: part.seconds for part in instruction_times(text, CHIP, 2)}
    # Of two slices a device receives 1024 bytes, its own part of the sum and the sum of the other part.
    assert waits == pytest.approx({"copy.1": 3, "recv-done": 4 - 3})


def test_report() -> None:
    times = (
        InstructionTime(name="fusion.7", kind="products", times=24, seconds=0.030, op_name="jit(step)/dot_general"),
        InstructionTime(name="copy.1", kind="copies and transposes", times=1, seconds=0.004, op_name=""),
        InstructionTime(name="scan.3", kind="kernels", times=24, seconds=0.006, op_name="jit(step)/scan"),
    )
    report = dataclasses.replace(REPORT, times=times)
    lines = report.lines()
    table = lines[lines.index("where the time goes:") + 1 :]
    assert [line[:24].strip() for line in table] == [*KINDS, "total"]
    assert table[0] == "  products                    30.00 ms  75.0%"
    assert table[-1] == "  total                       40.00 ms 100.0%"
    listed = report.lines(largest=2)[len(lines) :]
    assert listed == [
        "instructions that take most of it:",
        "      30.00 ms products                 24 times fusion.7",
        "               jit(step)/dot_general",
        "       6.00 ms kernels                  24 times scan.3",
        "               jit(step)/scan",
    ]
    assert "copies and transposes" in report.lines(largest=3)[-1]
    assert report.lines(largest=3)[-1].endswith("copy.1")


def test_nothing_is_said_where_a_part_is_unknown() -> None:
    assert REPORT.seconds_by_kind is None
    assert not any("where the time goes" in line for line in REPORT.lines(largest=10))
