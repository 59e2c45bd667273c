"""Experts: the sorted backend and Triton's grouped products against a token loop in fp64."""

from __future__ import annotations

import pytest
import torch

from covering import covering
from lamella.ops.moe import experts as dispatched
from lamella.ops.moe import reference, segments

try:
    from lamella.ops.moe import triton as grouped
except ImportError:
    grouped = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_only = pytest.mark.skipif(grouped is None, reason="no triton")
DTYPES = [torch.float32, torch.bfloat16]
# Tokens, experts, choices, size, width.
SHAPES = [(1, 4, 1, 32, 48), (7, 3, 1, 20, 36), (40, 8, 2, 64, 40), (33, 5, 5, 16, 8), (9, 1, 1, 24, 16)]


class Case:
    """Random arguments; rows of x and base are strided, with NaN between them."""

    def __init__(self, shape, dtype, with_base=True, device=DEVICE):
        tokens, count, self.top_k, size, width = shape
        generator = torch.Generator().manual_seed(tokens)

        def random(*dims):
            return torch.randn(dims, generator=generator)

        def strided(values):
            x_fp32 = torch.full((tokens, size + 8), torch.nan, dtype=dtype, device=device)
            x_fp32[:, :size] = values
            return x_fp32[:, :size]

        self.x, self.base = strided(random(tokens, size)), strided(random(tokens, size)) if with_base else None
        self.logits = (random(tokens, count) * 2).to(device)
        self.gate_up = (random(count, 2 * width, size) * size**-0.5).to(device, dtype)
        self.down = (random(count, size, width) * width**-0.5).to(device, dtype)

    def arguments(self, tokens=slice(None)):
        base = None if self.base is None else self.base[tokens]
        return self.x[tokens], self.logits[tokens], self.top_k, self.gate_up, self.down, base

    def fp64_experts(self):
        """Compute all experts of all tokens in fp64, with weight 0 if not chosen."""
        x, gate_up, down = self.x.double(), self.gate_up.double(), self.down.double()
        total = torch.zeros_like(x) if self.base is None else self.base.double()
        chosen = self.logits.topk(self.top_k, dim=-1).indices
        for expert in range(gate_up.shape[0]):
            weight = self.logits.double()[:, expert, None].sigmoid()
            gate, up = ((weight * x) @ gate_up[expert].T).chunk(2, -1)
            out = (gate * gate.sigmoid() * up) @ down[expert].T
            total = total + out * (chosen == expert).any(-1, keepdim=True)
        return total


def close(actual, case):
    expected = case.fp64_experts()
    assert actual.dtype == case.x.dtype and actual.is_contiguous()
    # Rounded in between, once at least: by the root mean square of what is added up.
    tolerance = 3e-5 if actual.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * float(expected.std()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_base", [True, False])
@torch.inference_mode()
def test_plain_forms(shape, dtype, with_base):
    case = Case(shape, dtype, with_base)
    before = [x.clone() for x in case.arguments() if isinstance(x, torch.Tensor)]
    for function in (reference.experts, segments.experts, dispatched):
        close(function(*case.arguments()), case)
    after = [x for x in case.arguments() if isinstance(x, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("shape", [(7, 3, 1, 20, 36), (40, 8, 2, 64, 40), (2, 5, 1, 16, 8)])
@pytest.mark.parametrize("with_base", [True, False])
@torch.inference_mode()
def test_outputs_of_expert_shards_add_up(shape, with_base):
    """Shards of two ranks, possibly empty, one of which adds the base."""
    case = Case(shape, torch.float32, with_base)
    forms = [reference.experts, segments.experts, dispatched] + ([grouped.experts] if grouped else [])
    for function in forms:
        total = torch.zeros_like(case.fp64_experts())
        for first, stop in ((0, 1), (1, shape[1])):
            x, logits, top_k, gate_up, down, base = case.arguments()
            some = gate_up[first:stop], down[first:stop], base if first else None
            total += function(x, logits, top_k, *some, first).double()
        close(total.to(case.x.dtype), case)


def test_weights_multiply_the_inputs_of_experts():
    """Weighting the outputs would be another function."""
    case = Case((5, 3, 1, 16, 16), torch.float32, with_base=False)
    ids, weights = reference.route(case.logits, 1)
    plain = reference.experts(case.x, torch.full_like(case.logits, 1e4).where(_chosen(ids, 3), -1e4), *_rest(case))
    assert (reference.experts(*case.arguments()) - weights * plain).abs().max() > 0.05


def _chosen(ids, count):
    return torch.zeros(ids.shape[0], count, dtype=torch.bool, device=ids.device).scatter(1, ids, True)


def _rest(case):
    return case.top_k, case.gate_up, case.down


def test_gradients_pass():
    case = Case((6, 3, 2, 16, 16), torch.float32, device="cpu")
    weights = [case.gate_up.requires_grad_(), case.down.requires_grad_(), case.logits.requires_grad_()]
    dispatched(*case.arguments()).square().sum().backward()
    gradients = [weight.grad.clone() for weight in weights]
    for weight in weights:
        weight.grad = None
    case.fp64_experts().square().sum().backward()
    for gradient, weight in zip(gradients, weights, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-4)


@triton_only
@covering({"shape": SHAPES, "dtype": DTYPES, "with_base": [True, False]})
def test_grouped(shape, dtype, with_base):
    case = Case(shape, dtype, with_base)
    small = grouped.Settings(16, 16, 16, 4, 1)
    for settings in (None, (small, small._replace(columns=32))):
        close(grouped.experts(*case.arguments(), settings=settings), case)


@triton_only
@pytest.mark.parametrize("shape", [(40, 8, 2), (3, 5, 1), (17, 16, 16), (1, 1, 1), (300, 7, 3)])
@pytest.mark.parametrize("by", ["one program", "sorting"])
def test_plan(shape, by, monkeypatch):
    tokens, count, top_k = shape
    logits = torch.randn(tokens, count + 3, device=DEVICE)[:, :count]
    monkeypatch.setattr(grouped, "_ONE_PROGRAM", 1 << 20 if by == "one program" else 0)
    rows, weights, bounds = (part.cpu() for part in grouped.make_plan(logits, top_k))
    ids, expected = reference.route(logits.cpu(), top_k)
    assert bounds[0] == 0 and bounds[-1] == tokens * top_k
    assert rows.sort().values.tolist() == list(range(tokens * top_k))
    for expert in range(count):
        here = slice(bounds[expert], bounds[expert + 1])
        order = (ids == expert).nonzero()
        assert (rows[here] // top_k).tolist() == order[:, 0].tolist()
        torch.testing.assert_close(weights[here], expected[ids == expert])


@triton_only
def test_nan_rows_do_not_affect_other_rows():
    """Padding rows of a graph may contain anything; equal logits are ordered."""
    case = Case((6, 4, 2, 16, 16), torch.float32)
    case.x[2] = case.logits[2] = torch.nan
    case.logits[4] = torch.inf
    case.logits[5] = 0.0
    out = grouped.experts(*case.arguments())
    rows, _, bounds = grouped.make_plan(case.logits, 2)
    assert sorted(rows.tolist()) == list(range(12)) and bounds.tolist()[-1] == 12
    others = torch.tensor([0, 1, 3], device=DEVICE)
    torch.testing.assert_close(out[others], case.fp64_experts().float()[others], rtol=1e-5, atol=1e-5)
    assert out[4:].isfinite().all()


@triton_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_do_not_depend_on_one_another(dtype):
    case = Case((20, 4, 2, 32, 32), dtype)
    settings = (grouped.Settings(16, 32, 16, 4, 1),) * 2
    together = grouped.experts(*case.arguments(), settings=settings)
    for token in (0, 7, 19):
        alone = slice(token, token + 1)
        found = grouped.experts(*case.arguments(alone), settings=settings)
        # In the interpreter products are numpy's, in which a row's sum may depend on where in the block it stands.
        tolerance = 0.0 if DEVICE == "cuda" else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, together[alone], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("with_base", [True, False])
def test_torch_compile_sees_one_operation(with_base):
    """The computation depends on the routing, which a trace cannot contain; shapes vary."""
    compiled = torch.compile(dispatched, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((7, 3, 2, 20, 36), (12, 3, 2, 20, 36)):
        case = Case(shape, torch.float32, with_base)
        with torch.no_grad():
            assert torch.equal(compiled(*case.arguments()), dispatched(*case.arguments()))
