"""What kernels of a training step are told apart by."""

from steps.kernels import by_class, class_of, rows

# Names as a trace of a step on an H100 has them.
NAMES = {
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTT": "matrix products",
    "pallas_gpu_backward_mosaic_gpu_kernel": "recurrence, backward",
    "pallas_gpu_forward_mosaic_gpu_kernel": "recurrence, forward",
    "ssd_walk_back_mosaic_gpu_kernel": "recurrence, backward",
    "ssd_walk_mosaic_gpu_kernel": "recurrence, forward",
    "causal_conv1d_backward_mosaic_gpu_kernel": "convolution",
    "loop_select_fusion_1": "optimizer",
    "loop_concatenate_fusion_3": "copies",
    "input_convert_reduce_fusion_95": "reductions",
    "loop_convert_fusion_4": "elementwise",
}


def test_names_have_classes() -> None:
    assert {name: class_of(name) for name in NAMES} == NAMES


def test_times_of_a_class_add_up_and_shares_to_all() -> None:
    kernels = {"nvjet_a": (2, 30.0), "ssd_walk": (1, 50.0), "cutlass_b": (3, 20.0)}
    assert by_class(kernels) == {"matrix products": (5, 50.0), "recurrence, forward": (1, 50.0)}
    shares = [figures["share_%"] for heading, _, figures in rows(kernels) if heading == "classes of kernels"]
    assert shares == [50.0, 50.0]
    assert [name for heading, name, _ in rows(kernels, longest=1) if heading == "longest kernels"] == ["nvjet_a"]
