"""The start-up self-check, with the kernels in Triton's interpreter if there is no GPU."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")

from lamella.errors import KernelError
from lamella.ops import backend, self_check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = {
    "rms_norm": "rms_norm",
    "swiglu": "swiglu",
    "short_conv": "short_conv",
    "moe": "experts",
    "qkv": "prepare_qkv",
    "rotary": "angles",
    "attention": "decode_attention",
    "gated_rms_norm": "gated_rms_norm",
    "delta_rule": "delta_rule",
    "selective_scan": "selective_scan",
}


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda x: "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_pass(dtype):
    self_check.self_check(dtype, DEVICE)


@pytest.mark.parametrize("op", KERNELS)
def test_a_wrong_kernel_is_named(op, monkeypatch):
    module = import_module(f"lamella.ops.{op}.triton")
    right = getattr(module, KERNELS[op])

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        first, *others = result if isinstance(result, tuple) else (result,)
        return (first * 1.3 + 0.3, *others) if others else first * 1.3 + 0.3

    monkeypatch.setattr(module, KERNELS[op], wrong)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this machine")
    with pytest.raises(KernelError, match=r"differs from its reference by .* on this machine .*refusing"):
        self_check.self_check(torch.float32, DEVICE)


def test_without_kernels_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda x: backend.PORTABLE)
    monkeypatch.setattr(self_check, "_checks", lambda *args: pytest.fail("checked"))
    self_check.self_check(torch.float32, DEVICE)
