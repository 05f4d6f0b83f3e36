"""Counts from a compiled program's text, and the roofline that is drawn from them."""

import dataclasses

import pytest

from mamba_jax.chips import CHIPS, GIB
from mamba_jax.pods.estimate import MIB, StepEstimate
from mamba_jax.pods.hlo import KERNELS, count_instructions

# The form of the TPU compiler's texts, with what matters here: a loop of 3 turns around one that counts from 1 to 8, a
# gather that goes on beside another fusion, a sum of which a device keeps its part, and a sum over two slices.
PROGRAM = """
%fused_start (p: bf16[8,16]) -> bf16[8,128] {
  %all-gather.1 = bf16[8,128]{1,0:T(8,128)} all-gather(%p), channel_id=5, replica_groups=[2,8]<=[16]
}
%fused_beside (p: bf16[8,16]) -> bf16[8,128] {
  %all-gather.2 = bf16[8,128]{1,0:T(8,128)} all-gather(%p), channel_id=5, replica_groups=[2,8]<=[16]
}
%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %all-reduce.1 = f32[64]{0} all-reduce(%p), channel_id=6, replica_groups=[2,8]<=[16]
}
%inner_cond (p: (f32[], u32[])) -> pred[] {
  %get-tuple-element.1 = u32[]{:T(128)} get-tuple-element(%p), index=1
  %constant.1 = u32[]{:T(128)} constant(8)
}
%inner_body (p: (u32[])) -> (u32[]) {
  %collective-permute-done = bf16[4,16]{1,0} collective-permute-done(%q)
}
%outer_cond (p: (s32[])) -> pred[] {
  %get-tuple-element.2 = s32[]{:T(128)} get-tuple-element(%p), index=0
  %constant.2 = s32[]{:T(128)} constant(3)
}
%outer_body (p: (s32[])) -> (s32[]) {
  %constant.3 = u32[]{:T(128)} constant(1)
  %copy.1 = u32[]{:T(128)} copy(%constant.3)
  %tuple.1 = (f32[]{:T(128)}, u32[]{:T(128)}) tuple(%p, /*index=1*/%copy.1)
  %while.1 = (f32[], u32[]) while(%tuple.1), condition=%inner_cond, body=%inner_body
  %start = bf16[8,128] fusion(%p), kind=kCustom, calls=%fused_start, backend_config={"estimated_cycles":"100"}
  %beside = bf16[8,128] fusion(%p), kind=kOutput, calls=%fused_beside, backend_config={"estimated_cycles":"50"}
  %causal_conv1d_pallas_tpu_forward.3 = bf16[2,64,1024]{2,1,0} custom-call(%p), custom_call_target="tpu_custom_call"
  %x = bf16[1,32,512]{2,1,0} copy(%p)
  %selective_scan_pallas_tpu_edge.1 = f32[1,1,16,512]{3,2,1,0} custom-call(%x, %p), custom_call_target="tpu_custom_call"
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %while.2 = (s32[]) while(%p), condition=%outer_cond, body=%outer_body
  %fusion.2 = f32[8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"7"}
  %recv = (f32[2,128]{1,0:T(2,128)}, u32[]{:S(2)}, token[]) recv(%after), _xla_megascale_transfer_type="ALL_REDUCE"
  %recv-done = (f32[2,128]{1,0:T(2,128)}, token[]) recv-done(%recv), channel_id=3
}
"""


def test_counts() -> None:
    counts = count_instructions(PROGRAM, num_slices=2)
    assert counts.cycles == 3 * (100 + 50) + 7
    assert dict(counts.calls) == {
        "collective-permute": 3 * 7,
        "all-gather": 3,
        "reduce-scatter": 1,
        "causal_conv1d_pallas_tpu_forward": 3,
        "selective_scan_pallas_tpu_edge": 3,
    }
    assert dict(counts.arrived) == {
        "collective-permute": 3 * 7 * 4 * 16 * 2,
        "all-gather": 3 * 8 * 128 * 2,
        "reduce-scatter": 64 * 4,
    }
    assert dict(counts.transfers) == {"all-reduce": 1}
    assert dict(counts.received) == {"all-reduce": 2 * 128 * 4}
    assert dict(counts.kernel_elements) == {
        "causal_conv1d_pallas_tpu_forward": 3 * 2 * 64 * 1024,
        "selective_scan_pallas_tpu_edge": 3 * 32 * 512,
    }


def test_kernels_without_a_schedule_are_named() -> None:
    added = '  %splash_mha_fwd.7 = (bf16[2,64]) custom-call(%p), custom_call_target="tpu_custom_call"'
    first = next(line for line in PROGRAM.splitlines() if "%selective_scan_pallas_tpu_edge.1" in line)
    counts = count_instructions(PROGRAM.replace(first, f"{first}\n{added}"), num_slices=2)
    assert dict(counts.other_kernels) == {"splash_mha_fwd": 3}
    assert not count_instructions(PROGRAM, num_slices=2).other_kernels


def test_sum_over_more_slices_moves_more() -> None:
    # Of 4 slices, a device needs 3 quarters of the terms of its part, and the 3 other parts' sums.
    assert count_instructions(PROGRAM, num_slices=4).received["all-reduce"] == 2 * 3 / 4 * 2 * 128 * 4


REPORT = StepEstimate(
    devices=32,
    num_slices=2,
    device_kind="TPU v5 lite",
    memory={"parameters": GIB, "temporaries": 3 * GIB},
    reused=GIB,
    collectives={"all-reduce": (4, 2**20 * 200)},
    collective_lines=(),
    between_slices={"all-reduce": (1, 2**20 * 25)},
    kernels={"selective_scan_pallas_tpu_forward": 24},
    flops=197e12 * 0.020,
    operation_seconds=0.030,
    kernel_seconds=0.010,
)


def test_roofline() -> None:
    chip = CHIPS["TPU v5 lite"]
    assert chip.link_bytes_per_second is not None
    links, network = 200 * MIB / chip.link_bytes_per_second, 25 * MIB / 3.125e9
    assert REPORT.matmul_seconds == pytest.approx(0.020)
    assert REPORT.expected_seconds == pytest.approx((0.040, 0.040 + links + network))
    slow = dataclasses.replace(REPORT, between_slices={"all-reduce": (1, 2**20 * 250)})
    assert slow.expected_seconds == pytest.approx((10 * network, 0.040 + links + 10 * network)), (
        "the network is the limit"
    )
    lines = REPORT.lines()
    assert lines[0] == "32 devices of kind TPU v5 lite in 2 slices"
    assert lines[lines.index("between slices:") + 1] == "  all-reduce               1 times       25.0 MiB"
    assert "  model FLOPs utilisation at most 50.0%" in lines


def test_unpublished_figures_leave_the_time_open() -> None:
    trillium = dataclasses.replace(
        REPORT, device_kind="TPU v6 lite", operation_seconds=None, kernel_seconds=None, between_slices={}
    )
    assert trillium.expected_seconds is None
    assert trillium.capacity == 32 * GIB
    assert any("XLA's operations by the compiler's estimate unknown" in line for line in trillium.lines())
    assert not any("expected" in line for line in trillium.lines())
    older = dataclasses.replace(REPORT, device_kind="TPU v4")
    assert older.network_seconds is None
    assert older.expected_seconds is None
    unknown = dataclasses.replace(trillium, device_kind="TPU v99")
    assert unknown.capacity is unknown.link_seconds is None
    assert unknown.matmul_seconds == 0


def test_cycles_are_of_one_core() -> None:
    """Two cores share a v5p's work, so a kernel of so many tokens and channels takes half of its cycles."""
    cores = CHIPS["TPU v5"].cores
    assert cores is not None
    name = KERNELS[0]
    assert cores.kernel_seconds({name: 1024 * 1000}) == pytest.approx(1000 * cores.kernel_cycles[name] / 2 / 1.75e9)
