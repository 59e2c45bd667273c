"""Random arguments of the recurrent operations, with NaN in memory that must not be read."""

from __future__ import annotations

import torch

from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch

# New tokens and tokens in all of each request.
BATCHES = {
    "decode": ([1, 1, 1, 1], [1, 2, 3, 40]),
    "mixed": ([1, 1, 2, 17, 1, 63], [7, 1, 3, 17, 2, 100]),
    "one": ([11], [11]),
}
LONG = {"lengths": ([1, 2, 63, 64, 65, 127, 200], [9, 2, 63, 99, 65, 300, 201])}


def rows_apart(values, gap):
    """Return the same values (T, heads, D) or (T, heads), with each token in the middle of a wider row of NaN."""
    flat = values.flatten(1)
    base = torch.full((flat.shape[0], flat.shape[1] + 2 * gap), torch.nan, dtype=values.dtype, device=values.device)
    base[:, gap:-gap] = flat
    return base[:, gap:-gap].unflatten(1, values.shape[1:])


def ring(inputs, width):
    """Return the ring buffer (W-1, C) of a request's inputs (T, C), the first at position 0."""
    rows = torch.zeros(width - 1, inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
    for position in range(max(0, len(inputs) - (width - 1)), len(inputs)):
        rows[position % (width - 1)] = inputs[position]
    return rows


class Case:
    """Operands by name, and states in slots with gaps between them."""

    def __init__(self, batch, state_shape, seed, device="cpu", dtype=torch.float32):
        self.batch = RaggedBatch.from_lengths(*batch, device)
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        count, size = self.batch.num_requests, torch.Size(state_shape).numel()
        self.slots = (torch.randperm(count + 2, generator=self.generator)[:count] + 1).to(device)
        self.blocks = torch.full((count + 3, size + 24), torch.nan, device=device)
        for slot, new, total in zip(self.slots, *batch, strict=True):
            if new < total:
                self.blocks[slot, 8 : 8 + size] = self.random(size)
        self.state_shape, self.span = state_shape, slice(8, 8 + size)
        self.operands: dict[str, torch.Tensor] = {}

    def random(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.device)

    def input(self, *shape):
        """Return random values for each token, in the dtype of activations, in strided rows."""
        return rows_apart(self.random(self.batch.num_tokens, *shape).to(self.dtype), 8)

    def state(self):
        """Return a copy of the blocks, and the slots in them."""
        blocks = self.blocks.clone()
        return blocks, blocks[:, self.span].unflatten(1, self.state_shape)

    def run(self, function, remembering=True, **changes):
        """Return the outputs and the updated blocks; check that no operand has changed."""
        operands = {**self.operands, **changes}
        before = {name: x if x is None else x.clone() for name, x in operands.items()}
        blocks, state = self.state()
        memory = {"state": RecurrentState(state, self.slots)} if remembering else {}
        with torch.inference_mode():
            y = function(**operands, batch=self.batch, **memory)
        for name, x in operands.items():
            assert x is None or same(x, before[name]), name
        return y, blocks

    def check_blocks(self, blocks):
        """Check that only the slots of the batch were written, and that they are finite."""
        inside = torch.zeros_like(blocks, dtype=torch.bool)
        inside[self.slots, self.span] = True
        assert blocks[inside].isfinite().all()
        assert same(blocks[~inside], self.blocks[~inside])


class DeltaCase(Case):
    def __init__(self, batch, heads, dims, by_channel, rate=0.0, seed=0, **options):
        (key_heads, value_heads), (key_dim, value_dim) = heads, dims
        super().__init__(batch, (value_heads, key_dim, value_dim), seed, **options)
        gates = (value_heads, key_dim) if by_channel else (value_heads,)
        self.operands = {
            "q": self.input(key_heads, key_dim),
            "k": self.input(key_heads, key_dim),
            "v": self.input(value_heads, value_dim),
            "decay": self.input(*gates),
            "beta": self.input(value_heads),
            "a_log": self.random(value_heads) * rate,
            "dt_bias": self.random(*gates),
        }


class ScanCase(Case):
    def __init__(self, batch, heads, dims, bias=True, rate=1.0, seed=0, **options):
        (x_heads, b_heads, num_heads), (channels, width) = heads, dims
        super().__init__(batch, (num_heads, channels, width), seed, **options)
        self.operands = {
            "x": self.input(x_heads, channels),
            "dt": self.input(num_heads, channels),
            "b": self.input(b_heads, width),
            "c": self.input(num_heads, width),
            "z": self.input(num_heads, channels),
            "a_log": self.random(num_heads, channels, width) * rate,
            "dt_bias": self.random(num_heads, channels) if bias else None,
            "d": self.random(num_heads, channels),
        }


def same(a, b):
    """Return True for bitwise equality; NaN equals NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def close(actual, expected, tolerance=1e-5, ulps=0):
    """Check equality within `tolerance` of the largest value plus rounding; NaN must match NaN."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, wanted = actual.double().nan_to_num(), expected.double().nan_to_num()
    bound = tolerance * wanted.abs().max() + ulps * torch.finfo(expected.dtype).eps * wanted.abs()
    assert ((actual - wanted).abs() <= bound).all(), float(((actual - wanted).abs() - bound).max())


def pieces(case, function, cuts):
    """A batch of requests from their starts, in pieces: `cuts[r]` are the numbers of tokens that r has in each turn
    (0: it sits the turn out, and decodes come first). Returns the outputs in the order of `case.batch`, and the blocks
    after them."""
    blocks, state = case.state()
    starts = case.batch.query_start_loc[:-1].tolist()
    done, outputs = [0] * len(cuts), [[] for _ in cuts]
    tokens = ("q", "k", "v", "decay", "beta", "x", "dt", "b", "c", "z")
    for turn in range(max(map(len, cuts))):
        active = [r for r in range(len(cuts)) if turn < len(cuts[r]) and cuts[r][turn]]
        if not active:
            continue
        active.sort(key=lambda r: cuts[r][turn] != 1)
        counts = [cuts[r][turn] for r in active]
        firsts = [starts[r] + done[r] for r in active]
        rows = [first + i for first, n in zip(firsts, counts, strict=True) for i in range(n)]
        batch = RaggedBatch.from_lengths(
            counts, [done[r] + n for r, n in zip(active, counts, strict=True)], case.device
        )
        operands = {name: x[rows] if name in tokens else x for name, x in case.operands.items()}
        with torch.inference_mode():
            y = function(**operands, batch=batch, state=RecurrentState(state, case.slots[active]))
        for r, n, part in zip(active, counts, y.split(counts), strict=True):
            outputs[r].append(part)
            done[r] += n
    return torch.cat([part for parts in outputs for part in parts]), blocks
