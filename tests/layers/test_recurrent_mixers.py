"""Recurrent mixers over their state: prompts, steps and second prompts in any pieces equal one forward.

Published implementations are wrong in the third phase, several tokens on existing state: some ignore the convolution
window, and some also the matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor, nn

from covering import covering
from lamella.config import GatedDeltaNetConfig, KimiDeltaConfig, MambaConfig, NormConfig
from lamella.layers.build import build
from lamella.layers.context import ForwardBatch, forward_batch
from lamella.layers.local_kit import LocalKit
from lamella.layers.recurrent import RecurrentMixer
from lamella.layers.sublayer_input import SublayerInput
from lamella.models.base import initialize
from lamella.ops.backend import portable_only
from lamella.ops.ragged import RaggedBatch

NORM = NormConfig(eps=1e-5)
KERNEL = 4
SLOTS = 11
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}  # of the largest value


def gdn(value_heads: int, key_heads: int, key_dim: int, value_dim: int) -> GatedDeltaNetConfig:
    return GatedDeltaNetConfig(
        value_heads=value_heads,
        key_heads=key_heads,
        key_head_dim=key_dim,
        value_head_dim=value_dim,
        kernel=KERNEL,
        norm=NORM,
    )


def kda(heads: int, head_dim: int, gate: str = "silu") -> KimiDeltaConfig:
    return KimiDeltaConfig(num_heads=heads, head_dim=head_dim, kernel=KERNEL, norm=NORM, gate=gate)


def mamba(inner: int, narrow: int, repeat_before: bool) -> MambaConfig:
    return MambaConfig(
        state_size=16,
        inner_size=inner,
        kv_size=narrow,
        dt_rank=16,
        kernel=KERNEL,
        repeat_before_conv=repeat_before,
    )


# The shapes of the published tests, and as many of mamba, which they leave out.
GRID = {
    "gdn (8,4,32,32)": gdn(8, 4, 32, 32),
    "gdn (8,2,64,64)": gdn(8, 2, 64, 64),
    "gdn (4,2,32,64)": gdn(4, 2, 32, 64),
    "kda (4,8)": kda(4, 8),
    "kda (8,16)": kda(8, 16),
    "kda (4,32)": kda(4, 32),
    "kda (4,32) sigmoid": kda(4, 32, "sigmoid"),
    "mamba (256,64)": mamba(256, 64, True),
    "mamba (256,64) repeated behind": mamba(256, 64, False),
    "mamba (128,128)": mamba(128, 128, True),
}
SMALL = {name: GRID[name] for name in ("gdn (4,2,32,64)", "kda (4,8)", "kda (4,32) sigmoid", "mamba (256,64)")}
SMALL["mamba (256,64) repeated behind"] = GRID["mamba (256,64) repeated behind"]
Mixer = GatedDeltaNetConfig | KimiDeltaConfig | MambaConfig


BACKENDS = {"native": nullcontext, "torch": portable_only}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request) -> Iterator[None]:
    """The kernels that are available here, and plain torch."""
    with BACKENDS[request.param]():
        yield


@torch.no_grad()
def built(config: Mixer, hidden_size: int, dtype: torch.dtype = torch.float32) -> RecurrentMixer:
    """Return a mixer with initial weights, except for larger projections and convolutions, over slots of NaN."""
    module = build(config, LocalKit(dtype), hidden_size, "mixer", None)
    generator = torch.Generator().manual_seed(0)
    initialize(module, generator)
    for name, parameter in module.named_parameters():
        if "proj" in name and parameter.dim() == 2:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
    specs = module.history.state_module.specs
    module.history.state_module.bind(*(torch.full((SLOTS, *spec.shape), torch.nan, dtype=spec.dtype) for spec in specs))
    return module.eval()


def rows(module: RecurrentMixer) -> tuple[Tensor, ...]:
    """Return the convolution windows and the matrices of all slots."""
    return module.history.state_module.rows


def tokens(lengths: Iterable[int], hidden_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, hidden_size, generator=generator).to(dtype) for length in lengths]


@torch.no_grad()
def step(module: nn.Module, pieces: Sequence[Tensor], seen: Sequence[int], slots: Sequence[int] | None) -> list[Tensor]:
    """Return the outputs of each request's piece after `seen` earlier tokens. Pieces of one token must come first."""
    lengths = [piece.shape[0] for piece in pieces]
    ragged = RaggedBatch.from_lengths(lengths, [new + old for new, old in zip(lengths, seen, strict=True)])
    batch = ForwardBatch(ragged, slots=None if slots is None else torch.tensor(slots))
    with forward_batch(batch):
        return list(module(None, SublayerInput.from_tensor(torch.cat(list(pieces)))).split(lengths))


def run(module: nn.Module, xs: Sequence[Tensor], bounds: Sequence[Sequence[int]], slots: Sequence[int]) -> list[Tensor]:
    """Return the outputs of requests in pieces, each split at its own `bounds`, phase by phase."""
    outputs: list[list[Tensor]] = [[] for _ in xs]
    snapshots = [list(pairwise((0, *each))) for each in bounds]
    for phase in range(max(map(len, snapshots))):
        there = [r for r in range(len(xs)) if phase < len(snapshots[r])]
        there.sort(key=lambda r: snapshots[r][phase][1] - snapshots[r][phase][0] > 1)
        pieces = [xs[r][slice(*snapshots[r][phase])] for r in there]
        found = step(module, pieces, [snapshots[r][phase][0] for r in there], [slots[r] for r in there])
        for r, piece in zip(there, found, strict=True):
            outputs[r].append(piece)
    return [torch.cat(each) for each in outputs]


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite for NaN."""
    gap = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(gap.nan_to_num(torch.inf))


def same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert distance(found, expected) <= tolerance


def phases(prompt: int, steps: int, second: int) -> list[int]:
    """Bounds of a prompt, steps of one token, and a second prompt."""
    return list(accumulate([prompt, *[1] * steps, second]))


@covering(
    {
        "name": list(GRID),
        "dtype,hidden_size": [(torch.float32, 256), (torch.float32, 512), (torch.bfloat16, 512)],
        "backend": list(BACKENDS),
    },
    indirect=["backend"],
)
def test_prompt_steps_and_second_prompt_equal_one_forward(name, hidden_size, dtype):
    """Compare outputs, windows and matrices, for 1, 2 and 4 requests of different lengths at a time."""
    module = built(GRID[name], hidden_size, dtype)
    tolerance = TOLERANCE[dtype]
    lengths = [(1, 2), (2, KERNEL), (KERNEL - 1, 65), (KERNEL, 1), (63, 16), (64, 4), (65, 64), (127, 16), (200, 4)]
    lengths += [(1, KERNEL - 1), (5, 127), (64, 64)]
    for count in (1, 2, 4):
        for start in range(0, len(lengths), count):
            some = lengths[start : start + count]
            bounds = [phases(prompt, 4, second) for prompt, second in some]
            xs = tokens([each[-1] for each in bounds], hidden_size, dtype, seed=start)
            whole = list(range(count))
            slots_apart = [9, 6, 10, 5][:count]
            plain = step(module, xs, [0] * count, None)
            expected = step(module, xs, [0] * count, whole)
            found = run(module, xs, bounds, slots_apart)
            for one, other, third in zip(found, expected, plain, strict=True):
                same(one, other, tolerance)
                same(other, third, tolerance / 10)
            window, matrix = rows(module)
            same(window[slots_apart], window[whole], tolerance)
            same(matrix[slots_apart], matrix[whole], tolerance)
            assert matrix.dtype == torch.float32 and window.dtype == dtype
            with torch.no_grad():
                for row in rows(module):
                    row.fill_(torch.nan)


@pytest.mark.parametrize("name", GRID)
def test_short_prompts_in_every_combination(name):
    """First and second prompts around the convolution's width, where a window is part old, part new."""
    module = built(GRID[name], 256)
    around = range(1, KERNEL + 2)
    cases = [(first, steps, second) for first in around for steps in (0, 1) for second in around]
    for first, steps, second in cases:
        (x,) = tokens([first + steps + second], 256)
        (expected,) = step(module, [x], [0], [0])
        (found,) = run(module, [x], [phases(first, steps, second)], [7])
        same(found, expected, 2e-4)
        for row in rows(module):
            same(row[7], row[0], 2e-4)


@pytest.mark.parametrize("name", SMALL)
def test_every_split_of_a_prompt_gives_the_same_result(name):
    """All 64 splits of seven tokens, and splits of a longer prompt near the bounds of chunks and windows."""
    module = built(SMALL[name], 256)
    snapshots = [[p for p in range(1, 8) if p == 7 or (mask >> (p - 1)) & 1] for mask in range(64)]
    snapshots += [[p, 70] for p in (1, 2, KERNEL - 1, KERNEL, 17, 31, 32, 33, 47, 62, 63, 64, 65, 66, 67, 68, 69)]
    for length in (7, 70):
        (x,) = tokens([length], 256)
        (expected,) = step(module, [x], [0], [0])
        for bounds in (each for each in snapshots if each[-1] == length):
            (found,) = run(module, [x], [bounds], [3])
            same(found, expected, 2e-4)
            for row in rows(module):
                same(row[3], row[0], 2e-4)


@pytest.mark.parametrize("lost", ["window", "matrix"])
@pytest.mark.parametrize("before", ["a step", "the second prompt"])
@pytest.mark.parametrize("name", GRID)
def test_losing_the_window_or_the_matrix_would_be_detected(name, before, lost):
    """Control: with the window or the matrix zeroed between phases, the following outputs are wrong."""
    module = built(GRID[name], 256)
    (x,) = tokens([65 + 1 + 16], 256)
    seen, until = (65, 66) if before == "a step" else (66, 82)
    (expected,) = step(module, [x], [0], [0])
    (begun,) = run(module, [x[:seen]], [[65, seen] if seen > 65 else [65]], [1])
    same(begun, expected[:seen], 2e-4)
    window, matrix = rows(module)
    kept = [row[1].clone() for row in rows(module)]
    (window if lost == "window" else matrix)[1] = 0
    (wrong,) = step(module, [x[seen:until]], [seen], [1])
    assert distance(wrong[:1], expected[seen : seen + 1]) > 100 * 2e-4
    for row, before_it in zip(rows(module), kept, strict=True):
        row[1] = before_it
    (right,) = step(module, [x[seen:until]], [seen], [1])
    same(right, expected[seen:until], 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_other_requests_in_the_batch_change_nothing(name, dtype):
    """A request's outputs and slot do not depend on other requests in any phase."""
    module = built(SMALL[name], 256, dtype)
    (x,) = tokens([40], 256, dtype)
    bounds = phases(20, 3, 17)
    (alone,) = run(module, [x], [bounds], [0])
    strangers = tokens([31, 3, 90], 256, dtype, seed=1)
    snapshots = [[5, 6, 7, 20, 31], [1, 2, 3], [1, 2, 66, 67, 90]]
    (among, *_) = run(module, [x, *strangers], [bounds, *snapshots], [4, 2, 8, 5])
    same(among, alone, 2e-6 if dtype == torch.float32 else 2e-2)
    for row in rows(module):
        same(row[4], row[0], 2e-6 if dtype == torch.float32 else 2e-2)
        others = [slot for slot in range(SLOTS) if slot not in (0, 4, 2, 8, 5)]
        assert row[others].isnan().all()
        assert row[[0, 4, 2, 8, 5]].isfinite().all()


@pytest.mark.parametrize("length", [1, 2, KERNEL - 1, KERNEL, 70])
@pytest.mark.parametrize("name", SMALL)
def test_a_recycled_slot_does_not_leak_the_previous_request(name, length):
    """The result is bitwise equal to that in a slot of NaN, including later steps."""
    module = built(SMALL[name], 256)
    old, new = tokens([50, length + 3], 256)
    bounds = phases(length, 2, 1)
    (fresh,) = run(module, [new], [bounds], [1])
    step(module, [old * 100], [0], [2])
    (recycled,) = run(module, [new], [bounds], [2])
    assert torch.equal(recycled, fresh)
    for row in rows(module):
        assert torch.equal(row[2], row[1])


@pytest.mark.parametrize("name", SMALL)
def test_inputs_and_weights_are_not_changed(name):
    module = built(SMALL[name], 256)
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    (x,) = tokens([20], 256)
    kept = x.clone()
    run(module, [x], [phases(9, 2, 9)], [3])
    step(module, [x], [0], None)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_extreme_decays_stay_finite(name):
    """Heads with decay 0 and decay 1, and tokens of zeros."""
    for rate in (-20.0, 5.0):
        module = built(SMALL[name], 256)
        with torch.no_grad():
            module.A_log.fill_(rate)
        (x,) = tokens([140], 256)
        x[70:80] = 0
        (expected,) = step(module, [x], [0], [0])
        (found,) = run(module, [x], [phases(70, 4, 66)], [1])
        assert expected.isfinite().all()
        same(found, expected, 2e-4)
        for row in rows(module):
            same(row[1], row[0], 2e-4)
