"""What a GPU did, from its kernels' times."""

from __future__ import annotations

from benchmarks.speed.gpu_profile import kind_of, summed


def test_kernels_that_run_at_once_cover_the_time_once_and_count_twice() -> None:
    spans = [(0, 4_000_000, "Memcpy HtoD"), (1_000_000, 3_000_000, "gemm a"), (6_000_000, 8_000_000, "gemm b")]
    spans += [(3_500_000, 5_000_000, "gemm a")]
    assert summed(spans, steps=2) == {
        "total_ms": 4.0,
        "idle_ms": 0.5,
        "kernels": 2.0,
        "by_kind": {"matrix products": 2.75, "copies": 2.0},
        "longest": {"Memcpy HtoD": 2.0, "gemm a": 1.75, "gemm b": 1.0},
    }
    assert summed([], steps=2) == {}


KERNELS = {
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "matrix products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64": "attention",
    "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float>": "layer norms",
    "triton_red_fused_add_native_layer_norm_native_layer_norm_backward_3": "compiled",
    "triton_poi_fused_gelu_5": "compiled",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedSgdMathFunctor>": "optimizer",
    "void nvjpeg::ycbcr_to_format_kernel_roi<(nvjpegChromaSubsampling_t)2>": "JPEG",
    "void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl>": "elementwise",
    "void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda>": "copies",
    "Memset (Device)": "copies",
}


def test_kernels_have_the_kind_that_their_name_says() -> None:
    assert {name: kind_of(name) for name in KERNELS} == KERNELS
