"""Tables of the GPU suite's result: what its rows of each kind show."""

from __future__ import annotations

Columns = list[tuple[str, str, str]]

_FAILED: Columns = [("skipped", "skipped", ""), ("error", "error", "")]

# Title: how the names of its rows begin, and its columns (key of a row, heading, format).
GPU_TABLES: dict[str, tuple[str, Columns]] = {
    "Correctness": (
        "check: ",
        [
            ("what", "check", ""),
            ("met", "met", ""),
            ("device", "device", ""),
            ("limit", "limit", "g"),
            ("images_per_s", "images/s", ",.0f"),
            ("first_batch_s", "first batch s", ".2f"),
            ("matrix_products", "arithmetic", ""),
            *_FAILED,
        ],
    ),
    "Training steps": (
        "step: ",
        [
            ("backbone", "backbone", ""),
            ("head", "head", ""),
            ("batch_size", "batch", ",d"),
            ("text_tokens", "text tokens", "d"),
            ("precision", "precision", ""),
            ("zero_stage", "ZeRO", "d"),
            ("compile", "compiled", ""),
            ("step_ms", "step ms", ",.2f"),
            ("images_per_s", "images/s", ",.0f"),
            ("graphs_ms", "in a CUDA graph ms", ",.2f"),
            ("graphs_images_per_s", "images/s", ",.0f"),
            ("over_bare", "step / plain loop's", ".3f"),
            ("over_bare_pure", "/ plain loop's in bf16 alone", ".3f"),
            ("over_bare_graphs", "graph / plain loop's graph", ".3f"),
            ("ifa_over_cls", "IFA / CLS", ".4f"),
            ("ifa_over_cls_in_bdl", "IFA over CLS, (B, D, L) floats", ".2f"),
            ("loaded_images_per_s", "end to end images/s", ",.0f"),
            ("over_model", "end to end / model", ".3f"),
            ("data_wait_share", "data wait", ".2%"),
            ("mfu_of_matmul", "MFU of matmul", ".3f"),
            ("memory_mb", "torch's peak MB", ",.0f"),
            ("memory_over_bare", "/ plain loop's", ".3f"),
            ("device_mb", "whole GPU MB", ",.0f"),
            ("dali_mb", "DALI's MB", ",.0f"),
            ("joules_per_image", "J an image", ".3f"),
            ("ready_s", "ready after s", ".0f"),
            *_FAILED,
        ],
    ),
    "Loaders": (
        "loader: ",
        [
            ("what", "loader", ""),
            ("threads", "threads", "d"),
            ("images_per_s", "images/s", ",.0f"),
            ("dali_images_per_s", "DALI's usual pipeline", ",.0f"),
            ("over_dali", "ours / it", ".3f"),
            ("cpu_s_per_1000", "CPU s per 1,000", ".3f"),
            ("dali_cpu_s_per_1000", "DALI's", ".3f"),
            ("jpeg_engine_busy_highest", "JPEG engine busy %, highest", "d"),
            *_FAILED,
        ],
    ),
}
