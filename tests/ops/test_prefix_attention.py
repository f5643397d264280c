"""prefix_attention: values, gradients, errors, and what no row may do to another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vlfast._extension import extension
from vlfast.ops import PackedRuns, backends, prefix_attention, reference

from . import oracles
from .support import assert_as_precise, assert_close, gradients, normal

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]

needs_kernel = pytest.mark.skipif(extension() is None, reason="vlfast._C is not built here")

# Lengths of prefixes and of suffixes.
LAYOUTS = [
    ([1], [1]),
    ([4], [3, 1, 5]),
    ([3, 5], [2, 0, 3, 4]),
    ([0], [2, 2]),
    ([], [3, 1]),
    ([3], []),
]
SUFFIXES = [2 + i * i % 7 for i in range(60)]  # of 2 to 6 rows, as names of classes are


def problem(prefixes, suffixes, heads=2, width=4, dtype=F64, seed=0):
    qkv = normal(sum(prefixes) + sum(suffixes), 3, heads, width, seed=seed, dtype=dtype)
    return qkv, PackedRuns.of(prefixes, suffixes)


def output_and_gradient(qkv, runs, scale=None):
    """[M, H, E], and [M, 3, H, E] for an upstream gradient that differs from row to row."""
    leaf = qkv.detach().requires_grad_()
    output = prefix_attention(leaf, runs, scale=scale)
    return output.detach(), *gradients([output], [leaf], keep_graph=False)


def assert_as_precise_as_pytorch(qkv, runs, scale=None):
    ours = output_and_gradient(qkv, runs, scale)
    with backends.reference_only():
        theirs = output_and_gradient(qkv, runs, scale)
        truth = output_and_gradient(qkv.double(), runs, scale)
    assert_as_precise(ours, theirs, truth)


def raw(qkv, runs, scale=None):
    """The op itself: the output, and the log of the normalisers."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.vlfast.prefix_attention(qkv, runs.offsets, runs.rows, runs.prefixes, scale)


class TestValuesAndGradients:
    @pytest.mark.parametrize(("prefixes", "suffixes"), LAYOUTS)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 1e-5)], ids=str)
    def test_the_equation(self, prefixes, suffixes, dtype, tolerance):
        qkv, runs = problem(prefixes, suffixes, dtype=dtype)
        exact = qkv.double().requires_grad_()
        expected = oracles.prefix_attention(exact, prefixes, suffixes, 4**-0.5)
        output, gradient = output_and_gradient(qkv, runs)
        assert_close(output, expected, tolerance)
        assert_close(gradient, *gradients([expected], [exact]), tolerance)

    @given(
        prefixes=st.lists(st.integers(0, 6), max_size=3),
        data=st.data(),
        heads=st.integers(1, 3),
        width=st.integers(1, 40),
        scale=st.floats(0.01, 3.0),
        dtype=st.sampled_from([F64, *DTYPES]),
        seed=st.integers(0, 10**6),
    )
    def test_every_layout(self, prefixes, data, heads, width, scale, dtype, seed):
        each = data.draw(st.integers(0, 4))
        count = max(len(prefixes), 1) * each
        suffixes = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
        qkv, runs = problem(prefixes, suffixes, heads, width, dtype, seed)
        if len(qkv) == 0:
            assert output_and_gradient(qkv, runs)[1].shape == (0, 3, heads, width)
            return
        exact = qkv.double().requires_grad_()
        expected = oracles.prefix_attention(exact, prefixes, suffixes, scale)
        output, gradient = output_and_gradient(qkv, runs, scale)
        tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
        assert_close(output, expected, tolerance)
        assert_close(gradient, *gradients([expected], [exact]), tolerance)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 1e-5)], ids=str)
    def test_it_is_causal_attention_with_the_prefix_repeated_for_each_run(self, dtype, tolerance):
        prefix, lengths = 6, [4, 2, 5]
        qkv, runs = problem([prefix], lengths, 3, 8, dtype)
        packed = prefix_attention(qkv, runs)
        start = prefix
        for length in lengths:
            whole = torch.cat([qkv[:prefix], qkv[start : start + length]]).transpose(0, 2)
            whole = torch.nn.functional.scaled_dot_product_attention(
                *whole.unbind(1), is_causal=True
            )
            whole = whole.transpose(0, 1)
            assert_close(packed[:prefix], whole[:prefix], tolerance)
            assert_close(packed[start : start + length], whole[prefix:], tolerance)
            start += length

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_low_precision_is_computed_in_fp32(self, dtype):
        qkv, runs = problem([3], [2, 3], dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            actual = prefix_attention(qkv, runs)
        expected = reference.prefix_attention(qkv.double(), runs, 0.5)
        assert actual.dtype == dtype
        tolerance = max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("dtype", [F64, F32], ids=str)
    def test_scale_replaces_the_default(self, dtype):
        qkv, runs = problem([2], [3], dtype=dtype)
        doubled = qkv * torch.tensor([2.0, 1.0, 1.0], dtype=dtype)[:, None, None]
        assert_close(prefix_attention(qkv, runs, scale=1.0), prefix_attention(doubled, runs), 1e-6)

    def test_gradcheck(self):
        qkv, runs = problem([2, 1], [2, 1, 0, 3], 2, 3)
        qkv.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: prefix_attention(x, runs, scale=0.7), qkv)


@needs_kernel
class TestKernelAccuracy:
    @pytest.mark.parametrize(
        ("prefixes", "suffixes", "heads", "width"),
        [
            ([1], [1], 1, 1),
            ([17], SUFFIXES, 8, 64),
            ([5, 4, 6], SUFFIXES, 3, 80),
            ([3, 0, 7], [0, 2, 4, 1, 0, 0, 9, 2, 0], 2, 33),
            ([77], [], 2, 64),
            ([], [60, 2, 33, 1], 3, 16),
            ([1], [20] * 12, 2, 128),
            ([2], [300, 5, 0, 70], 1, 24),
            ([40], [3] * 150, 2, 20),
            ([1], [1] * 9000, 1, 4),
        ],
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_layouts(self, dtype, prefixes, suffixes, heads, width):
        assert_as_precise_as_pytorch(*problem(prefixes, suffixes, heads, width, dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scale", [1e-30, 1.0, 30.0, 1e4])
    def test_scales(self, dtype, scale):
        assert_as_precise_as_pytorch(*problem([5], SUFFIXES[:20], 2, 32, dtype), scale)

    @pytest.mark.parametrize("offset", [100.0, -100.0])
    def test_scores_far_from_zero(self, offset):
        qkv, runs = problem([5], SUFFIXES[:20], 2, 32, F32)
        qkv[:, 0, :, 0], qkv[:, 1, :, 0] = offset, 8.0
        assert_as_precise_as_pytorch(qkv, runs)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_log_of_the_normalisers(self, dtype):
        qkv, runs = problem([3, 2], [2, 3, 4, 1], 3, 20, dtype)
        log_normaliser = raw(qkv, runs, 0.3)[1]
        assert log_normaliser.dtype == F32
        scores = 0.3 * torch.einsum("qhe,khe->hqk", *qkv.double()[:, :2].unbind(1))
        start, end, prefix_start, prefix_end = runs.rows[:, :, None]
        key = torch.arange(len(qkv))
        own = (key >= start) & (key < end) & (key <= key[:, None])
        seen = own | (key >= prefix_start) & (key < prefix_end)
        expected = scores.masked_fill(~seen, -torch.inf).logsumexp(-1).T
        assert_close(log_normaliser, expected, 1e-6)

    def test_every_value_of_half_precision_comes_through(self):
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
        for dtype in (F16, BF16):
            values = bits.view(dtype)
            qkv = torch.zeros(len(bits), 3, 1, 1, dtype=dtype)
            qkv[:, 2, 0, 0] = values
            alone = prefix_attention(qkv, PackedRuns.of([], [1] * len(bits)))[:, 0, 0]
            torch.testing.assert_close(alone, values, rtol=0, atol=0, equal_nan=True)
            # A row and the next with equal weights: the mean, which need not be a number of dtype.
            means = prefix_attention(qkv, PackedRuns.of([], [2] * (len(bits) // 2)))[1::2, 0, 0]
            expected = (0.5 * values[::2].float() + 0.5 * values[1::2].float()).to(dtype)
            torch.testing.assert_close(means, expected, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize(
        ("prefixes", "suffixes"), [*LAYOUTS, ([0, 0], [0, 0]), ([9], SUFFIXES)], ids=str
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_element_is_written(self, poisoned_memory, dtype, prefixes, suffixes):
        qkv, runs = problem(prefixes, suffixes, 3, 5, dtype)
        assert all(x.isfinite().all() for x in raw(qkv, runs))
        assert all(x.isfinite().all() for x in output_and_gradient(qkv, runs))

    def test_what_it_works_in_may_hold_anything(self):
        """A large problem leaves its numbers where a small one then works."""
        small = problem([3], [2, 5, 1], 2, 20, F32)
        first = output_and_gradient(*small)
        qkv, runs = problem([40], [50, 3, 7] * 9, 2, 70, F32)
        output_and_gradient(torch.full_like(qkv, torch.nan), runs)
        assert all(map(torch.equal, output_and_gradient(*small), first))


@needs_kernel
class TestRowsAlone:
    def test_the_number_of_threads_changes_no_bit(self):
        qkv, runs = problem([17, 9], SUFFIXES * 4, 3, 64, F32)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3, 8, 2):
                torch.set_num_threads(threads)
                results.append(output_and_gradient(qkv, runs))
        finally:
            torch.set_num_threads(before)
        for others in results[1:]:
            assert all(map(torch.equal, results[0], others))

    def test_a_run_has_the_same_bits_in_any_company(self):
        lengths = [3, 5, 2, 4, 40, 1, 33, 6]
        qkv, runs = problem([7], lengths, 2, 24, F32)
        together = prefix_attention(qkv, runs)
        offsets = runs.offsets.tolist()
        for run, length in enumerate(lengths, start=1):
            own = slice(offsets[run], offsets[run + 1])
            alone = prefix_attention(torch.cat([qkv[:7], qkv[own]]), PackedRuns.of([7], [length]))
            assert torch.equal(alone[:7], together[:7])
            assert torch.equal(alone[7:], together[own])

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("prefixes", [[4, 3], []], ids=str)
    def test_bad_values_stay_with_those_that_see_them(self, dtype, part, value, prefixes):
        qkv, runs = problem(prefixes, [2, 40, 5, 3], 2, 20, dtype)
        for row in (0, 5, 20, 45, len(qkv) - 1):
            self.check_bad_value(qkv, runs, row, part, value)

    @staticmethod
    def check_bad_value(qkv, runs, row, part, value):
        start, _, prefix_start, prefix_end = runs.rows
        rows = torch.arange(len(qkv))
        if part == 0:
            sees = rows == row
        else:
            sees = (rows >= row) & (start == start[row])
            sees |= (prefix_start <= row) & (row < prefix_end)
        # Rows that a row which sees it sees: their keys and values share in its gradient.
        reached = torch.zeros_like(sees)
        for reader in rows[sees].tolist():
            reached |= (rows >= start[reader]) & (rows <= reader)
            reached |= (rows >= prefix_start[reader]) & (rows < prefix_end[reader])
        good_output, good = output_and_gradient(qkv, runs)
        bad_qkv = qkv.clone()
        bad_qkv[row, part, 1, 3] = value
        output, gradient = output_and_gradient(bad_qkv, runs)

        # Only the head that it is in, and there at least the row itself.
        assert torch.equal(output[:, 0], good_output[:, 0])
        assert torch.equal(gradient[:, :, 0], good[:, :, 0])
        assert torch.equal(output[~sees], good_output[~sees])
        assert torch.equal(gradient[~sees, 0], good[~sees, 0])
        assert torch.equal(gradient[~reached, 1:], good[~reached, 1:])
        if value != value:
            assert output[sees, 1].isnan().any(-1).all()
            assert gradient[sees, 0, 1].isnan().any(-1).all()
        with backends.reference_only():
            expected = output_and_gradient(bad_qkv, runs)[0]
        if part < 2:
            assert torch.equal(output[sees].isfinite(), expected[sees].isfinite())

    def test_bad_upstreams_stay_with_what_their_row_sees(self):
        qkv, runs = problem([4, 3], [2, 6, 5, 3], 2, 20, F32)
        leaf = qkv.requires_grad_()
        output = prefix_attention(leaf, runs)
        upstream = normal(*output.shape, seed=3, dtype=F32)
        (good,) = torch.autograd.grad(output, leaf, upstream, retain_graph=True)
        upstream[11, 1, 4] = torch.nan  # the third row of the run of 6, after the prefix of 4
        (bad,) = torch.autograd.grad(output, leaf, upstream)
        assert torch.equal(bad[:, :, 0], good[:, :, 0])
        assert bad[11, 0, 1].isnan().all()
        queries = torch.arange(len(qkv)) != 11
        assert torch.equal(bad[queries, 0], good[queries, 0])
        seen = [0, 1, 2, 3, 9, 10, 11]
        others = [row for row in range(len(qkv)) if row not in seen]
        assert torch.equal(bad[others, 1:], good[others, 1:])
        assert bad[seen, 1:, 1].isnan().any(-1).all()


@needs_kernel
class TestKernelGradients:
    def test_the_kernel_serves(self):
        qkv, runs = problem([2], [2, 3], dtype=F32)
        output = prefix_attention(qkv.requires_grad_(), runs)
        assert "PrefixAttention" in type(output.grad_fn).__name__

    def test_nothing_is_kept_where_no_gradient_is_wanted(self):
        qkv, runs = problem([2], [2, 3], dtype=F32)
        frozen = prefix_attention(qkv, runs)
        wanted = prefix_attention(qkv.requires_grad_(), runs)
        with torch.no_grad():
            switched_off = prefix_attention(qkv, runs)
        assert frozen.grad_fn is None and switched_off.grad_fn is None
        assert torch.equal(frozen, wanted) and torch.equal(switched_off, wanted)

    def test_the_log_of_the_normalisers_promises_no_gradient(self):
        qkv, runs = problem([2], [2, 3], dtype=F32)
        output, log_normaliser = raw(qkv.requires_grad_(), runs)
        assert output.requires_grad and not log_normaliser.requires_grad

    def test_two_backwards_on_one_graph(self):
        qkv, runs = problem([2], [2, 3], dtype=F32)
        output = prefix_attention(qkv.requires_grad_(), runs)
        exact = qkv.detach().double().requires_grad_()
        expected = reference.prefix_attention(exact, runs, 0.5)
        for seed in (20, 30):
            actual = gradients([output], [qkv], seed)[0]
            assert_close(actual, gradients([expected], [exact], seed)[0], 1e-5)
            actual.zero_()

    def test_many_upstreams_at_once(self):
        qkv, runs = problem([2], [2, 3], dtype=F32)
        output = prefix_attention(qkv.requires_grad_(), runs)
        upstreams = normal(3, *output.shape, dtype=F32)
        (batched,) = torch.autograd.grad(
            output, qkv, upstreams, is_grads_batched=True, retain_graph=True
        )
        for upstream, together in zip(upstreams, batched, strict=True):
            (alone,) = torch.autograd.grad(output, qkv, upstream, retain_graph=True)
            torch.testing.assert_close(together, alone)

    def test_an_upstream_that_is_not_contiguous(self):
        qkv, runs = problem([2], [2, 3], dtype=F32)
        output = prefix_attention(qkv.requires_grad_(), runs)
        upstream = normal(4, 2, 7, dtype=F32).permute(2, 1, 0)
        for strided in (upstream, torch.ones(()).expand(output.shape)):
            given, copied = (
                torch.autograd.grad(output, qkv, x, retain_graph=True)[0]
                for x in (strided, strided.contiguous())
            )
            assert torch.equal(given, copied)

    def test_second_derivatives_need_the_reference(self):
        qkv, runs = problem([2], [1, 2], dtype=F32)
        output = prefix_attention(qkv.requires_grad_(), runs)
        with pytest.raises(RuntimeError, match="reference_only"):
            torch.autograd.grad(output.sum(), qkv, create_graph=True)
        qkv = qkv.detach().double().requires_grad_()
        with backends.reference_only():
            assert torch.autograd.gradgradcheck(lambda x: prefix_attention(x, runs), qkv)


@needs_kernel
class TestInPyTorch:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_opcheck(self, dtype):
        for layout in (([2, 3], [1, 2, 0, 4]), ([], [2]), ([0], [])):
            qkv, runs = problem(*layout, 2, 5, dtype)
            others = (runs.offsets, runs.rows, runs.prefixes, 0.3)
            for strided in (qkv, qkv.transpose(0, 3).contiguous().transpose(0, 3)):
                leaf = strided.detach().requires_grad_()
                torch.library.opcheck(torch.ops.vlfast.prefix_attention, (leaf, *others))
            output, log_normaliser = raw(qkv, runs, 0.3)
            for results in ((output, log_normaliser), (None, None)):
                torch.library.opcheck(
                    torch.ops.vlfast.prefix_attention_backward,
                    (normal(*output.shape, dtype=dtype), qkv, *results, *others),
                )

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, dynamic):
        torch.compiler.reset()

        def attention(qkv, runs):
            return prefix_attention(qkv.sin(), runs).cos()

        compiled = torch.compile(attention, fullgraph=True)
        for suffixes in ([2, 3], [1, 0, 4]):
            results = []
            for function in (attention, compiled):
                qkv, runs = problem([3], suffixes, dtype=F32)
                qkv.requires_grad_()
                if dynamic:
                    for tensor, dimension in ((qkv, 0), (runs.rows, 1), (runs.offsets, 0)):
                        torch._dynamo.mark_dynamic(tensor, dimension)
                output = function(qkv, runs)
                results.append([output.detach(), *gradients([output], [qkv], keep_graph=False)])
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-6)

    def test_compile_in_the_reference(self):
        torch.compiler.reset()
        qkv, runs = problem([3], [2, 3], dtype=F32)
        compiled = torch.compile(prefix_attention, fullgraph=True)
        expected = prefix_attention(qkv, runs)
        with backends.reference_only():
            torch.testing.assert_close(compiled(qkv, runs), expected)
        torch.testing.assert_close(compiled(qkv, runs), expected)

    def test_autocast_changes_nothing(self):
        qkv, runs = problem([3], [2, 3], dtype=F32)
        outside = output_and_gradient(qkv, runs)
        with torch.autocast("cpu", BF16):
            inside = output_and_gradient(qkv, runs)
        assert all(map(torch.equal, inside, outside))

    @pytest.mark.parametrize("dtype", [F64, F32], ids=str)
    def test_function_transforms(self, dtype):
        qkv, runs = problem([3], [2, 3], dtype=dtype)
        upstream = normal(*prefix_attention(qkv, runs).shape, seed=1, dtype=dtype)

        def loss(qkv):
            return (prefix_attention(qkv, runs) * upstream).sum()

        (expected,) = torch.autograd.grad(loss(qkv.requires_grad_()), qkv)
        torch.testing.assert_close(torch.func.grad(loss)(qkv.detach()), expected)
        _, slope = torch.func.jvp(loss, (qkv.detach(),), (torch.ones_like(qkv),))
        torch.testing.assert_close(slope, expected.sum(), rtol=1e-4, atol=1e-5)
        many = torch.stack([qkv.detach(), 2 * qkv.detach()])
        alone = torch.stack([prefix_attention(x, runs) for x in many])
        torch.testing.assert_close(torch.vmap(lambda x: prefix_attention(x, runs))(many), alone)

    def test_other_devices(self):
        qkv, runs = problem([3], [2, 3], dtype=F32)
        assert prefix_attention(qkv.to("meta"), runs.to("meta")).shape == (8, 2, 4)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_what_a_gpu_would_be_given(self, monkeypatch, dtype):
        """By tensors without data, so that no GPU is needed."""
        monkeypatch.setattr(backends, "why_no_kernel", lambda *_: None)
        calls = []

        class Calls(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), options=None):
                if function.namespace == "vlfast":
                    calls.append((function.__name__.split(".")[0], arguments))
                return function(*arguments, **(options or {}))

        with FakeTensorMode(), Calls():
            offsets, rows = torch.empty(4, dtype=torch.int32), torch.empty(4, 8).int()
            runs = PackedRuns(offsets, rows, 1, 3, 3).to("cuda")
            wide = torch.empty(8, 3, 2, 257, dtype=dtype, device="cuda")
            assert prefix_attention(wide, runs).shape == (8, 2, 257) and not calls
            qkv = torch.empty(8, 3, 2, 64, dtype=dtype, device="cuda", requires_grad=True)
            output = prefix_attention(qkv, runs)
            assert output.shape == (8, 2, 64) and output.dtype == dtype
            with torch.no_grad():  # and without autograd's engine, which would ask for a GPU
                gradient, *none = output.grad_fn.apply(torch.empty_like(output))
            assert gradient.shape == qkv.shape and gradient.dtype == dtype
            assert none == [None] * 4
        (forward, _), (backward, arguments) = calls
        assert (forward, backward) == ("prefix_attention", "prefix_attention_backward")
        upstream, qkv, output, log_normaliser, offsets, rows, prefixes, scale = arguments
        assert upstream.shape == output.shape == (8, 2, 64)
        assert upstream.dtype == qkv.dtype == output.dtype == dtype
        assert log_normaliser.shape == (8, 2) and log_normaliser.dtype == F32
        assert offsets.shape == (4,) and rows.shape == (4, 8) and (prefixes, scale) == (1, 0.125)

    def test_not_contiguous(self):
        qkv, runs = problem([3], [2, 3], dtype=F32)
        strided = qkv.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        assert not strided.is_contiguous()
        results = output_and_gradient(strided, runs), output_and_gradient(qkv, runs)
        assert all(map(torch.equal, *results))

    def test_inputs_are_not_written(self):
        qkv, runs = problem([3], SUFFIXES, 2, 20, F32)
        inputs = (qkv, runs.offsets, runs.rows)
        copies = [x.clone() for x in inputs]
        output_and_gradient(qkv, runs)
        assert all(map(torch.equal, inputs, copies))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or backends.why_no_kernel("prefix_attention", "cuda") is not None,
    reason="no CUDA device that Triton serves",
)
class TestOnGpu:
    @pytest.fixture(autouse=True)
    def launches(self, monkeypatch):
        """The name of each kernel that is called."""
        from vlfast.ops.triton import prefix_attention as kernels

        launches = []

        def counted(name):
            kernel = getattr(kernels, name)

            def count_and_call(*arguments):
                launches.append(name)
                return kernel(*arguments)

            return count_and_call

        for name in ("prefix_attention_forward", "prefix_attention_backward"):
            monkeypatch.setattr(kernels, name, counted(name))
        return launches

    @staticmethod
    def on_gpu(qkv, runs):
        return qkv.detach().cuda(), runs.to("cuda")

    @pytest.mark.parametrize(
        ("prefixes", "suffixes", "heads", "width"),
        [
            ([1], [1], 1, 16),
            ([17], SUFFIXES, 8, 64),
            ([5, 4, 6], SUFFIXES, 3, 80),
            ([3, 0, 7], [0, 2, 4, 1, 0, 0, 9, 2, 0], 2, 33),
            ([77], [], 2, 64),
            ([], [60, 2, 33, 1], 3, 16),
            ([1], [20] * 1000, 8, 64),
            ([2], [300, 5, 0, 70], 1, 24),
            ([40], [3] * 150, 2, 20),
        ],
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_accuracy(self, launches, dtype, prefixes, suffixes, heads, width):
        qkv, runs = problem(prefixes, suffixes, heads, width, dtype)
        ours = [x.cpu() for x in output_and_gradient(*self.on_gpu(qkv, runs))]
        assert launches == ["prefix_attention_forward", "prefix_attention_backward"]
        with backends.reference_only():
            truth = output_and_gradient(qkv.double(), runs)
        tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
        for result, exact in zip(ours, truth, strict=True):
            assert result.dtype == dtype
            assert_close(result, exact, tolerance)

    def test_log_of_the_normalisers(self):
        qkv, runs = problem([3, 2], [2, 3, 4, 1], 3, 20, F32)
        assert_close(raw(*self.on_gpu(qkv, runs))[1].cpu(), raw(qkv, runs)[1], 1e-5)

    def test_an_upstream_in_another_dtype(self):
        qkv, runs = self.on_gpu(*problem([3], [2, 3], 2, 16, F16))
        others = (*raw(qkv, runs, 0.3), runs.offsets, runs.rows, runs.prefixes, 0.3)
        upstream = normal(8, 2, 16, dtype=F16).cuda()
        backward = torch.ops.vlfast.prefix_attention_backward
        same, wider = (backward(x, qkv, *others) for x in (upstream, upstream.float()))
        assert torch.equal(same, wider)

    def test_runs_that_come_back_have_arrived(self):
        runs = PackedRuns.of([3], [2] * 10**6)
        moved = runs.to("cuda").to("cpu")
        assert torch.equal(moved.offsets, runs.offsets) and torch.equal(moved.rows, runs.rows)

    def test_the_same_bits_every_time(self):
        qkv, runs = self.on_gpu(*problem([17, 9], SUFFIXES * 4, 8, 64, BF16))
        first = output_and_gradient(qkv, runs)
        assert all(map(torch.equal, first, output_and_gradient(qkv, runs)))

    def test_every_element_is_written(self, poisoned_memory):
        for layout in (*LAYOUTS, ([9], SUFFIXES)):
            qkv, runs = self.on_gpu(*problem(*layout, 3, 20, F32))
            assert all(x.isfinite().all() for x in raw(qkv, runs))
            assert all(x.isfinite().all() for x in output_and_gradient(qkv, runs))

    def test_bad_values_stay_with_their_prefix(self):
        qkv, runs = self.on_gpu(*problem([4, 3], [2, 6, 5, 3], 2, 20, F32))
        good = output_and_gradient(qkv, runs)
        qkv[0, 1, 1, 4] = torch.nan
        bad = output_and_gradient(qkv, runs)
        others = [*range(4, 7), *range(15, 23)]
        for before, after in zip(good, bad, strict=True):
            assert torch.equal(after[others], before[others])
            assert torch.equal(after[..., 0, :], before[..., 0, :])
        assert bad[0][:4, 1].isnan().all() and bad[0][7:15, 1].isnan().all()

    def test_no_host_synchronisation(self, launches):
        qkv, runs = self.on_gpu(*problem([5], SUFFIXES, 2, 32, F16))
        qkv.requires_grad_()
        # Triton compiles, and loads its kernels, at the first call.
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                prefix_attention(qkv, runs).sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert qkv.grad.isfinite().all()
        assert len(launches) == 4


class TestPackedRuns:
    def test_where_rows_lie(self):
        runs = PackedRuns.of(torch.tensor([2, 1]), [1, 0, 2, 3])
        assert len(runs) == 6
        assert (runs.prefixes, runs.longest_prefix, runs.longest) == (2, 2, 3)
        assert runs.offsets.dtype == runs.rows.dtype == torch.int32
        assert runs.offsets.tolist() == [0, 2, 3, 4, 4, 6, 9]
        assert runs.rows.T.tolist() == [
            *[[0, 2, 0, 0]] * 2,
            [2, 3, 0, 0],
            [3, 4, 0, 2],
            *[[4, 6, 2, 3]] * 2,
            *[[6, 9, 2, 3]] * 3,
        ]

    def test_without_prefixes(self):
        runs = PackedRuns.of([], [2, 1])
        assert (runs.prefixes, runs.longest_prefix, runs.longest) == (0, 0, 2)
        assert runs.rows.T.tolist() == [*[[0, 2, 0, 0]] * 2, [2, 3, 0, 0]]

    def test_without_rows(self):
        for runs in (PackedRuns.of([], []), PackedRuns.of([0, 0], [0, 0])):
            assert runs.rows.shape == (4, 0) and runs.longest == 0

    def test_to_another_device(self):
        runs = PackedRuns.of([2], [1, 3])
        moved = runs.to("meta")
        assert moved.offsets.is_meta and moved.rows.is_meta
        assert (len(moved), moved.prefixes, moved.longest_prefix, moved.longest) == (3, 1, 2, 3)

    @pytest.mark.parametrize(
        ("prefixes", "suffixes", "message"),
        [
            ([2, -1], [1, 1], "prefix_lengths: expected lengths >= 0, got -1"),
            ([2], [-3], "suffix_lengths: expected lengths >= 0, got -3"),
            ([1, 1], [1, 1, 1], "suffix_lengths: expected a multiple of the 2 prefixes, got 3"),
            ([1], [2**31], r"suffix_lengths: expected fewer than 2\*\*31 rows"),
        ],
    )
    def test_errors(self, prefixes, suffixes, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            PackedRuns.of(prefixes, suffixes)

    @pytest.mark.parametrize("lengths", [[2.7, 1.0], torch.tensor([2.0, 1.0]), [True, False]])
    def test_lengths_that_are_no_integers(self, lengths):
        with pytest.raises(TypeError, match="^suffix_lengths: expected integers >= 0, got torch."):
            PackedRuns.of([1], lengths)
        with pytest.raises(TypeError, match="^prefix_lengths: expected integers >= 0, got torch."):
            PackedRuns.of(lengths, [1, 1])


class TestErrors:
    @pytest.mark.parametrize(
        ("qkv", "error", "message"),
        [
            (1.0, TypeError, r"qkv: .*\[M, 3, H, E\], got float"),
            (torch.zeros(8, 3, 2, 4, dtype=torch.int64), TypeError, "qkv: expected a floating"),
            (torch.zeros(8, 3, 8), ValueError, r"qkv: .*\[M, 3, H, E\]"),
            (torch.zeros(8, 2, 2, 4), ValueError, r"qkv: expected a shape \[M, 3, H, E\]"),
            (torch.zeros(8, 3, 0, 4), ValueError, "qkv: expected a shape"),
            (torch.zeros(8, 3, 2, 0), ValueError, "qkv: expected a shape"),
            (torch.zeros(9, 3, 2, 4), ValueError, "qkv: expected the 8 rows of runs"),
            (torch.zeros(8, 3, 2, 4, device="meta"), ValueError, "runs: expected device meta"),
        ],
    )
    def test_of_qkv(self, qkv, error, message):
        with pytest.raises(error, match=f"^{message}"):
            prefix_attention(qkv, PackedRuns.of([3], [2, 3]))

    def test_of_the_runs(self):
        qkv, runs = problem([3], [2, 3])
        with pytest.raises(TypeError, match="^runs: expected a PackedRuns, got list"):
            prefix_attention(qkv, [3, 2, 3])
        wide = PackedRuns(runs.offsets.long(), runs.rows, 1, 3, 3)
        with pytest.raises(TypeError, match=r"^runs.offsets: .*torch.int32 \[R \+ 1\]"):
            prefix_attention(qkv, wide)
        wide = PackedRuns(runs.offsets, runs.rows.long(), 1, 3, 3)
        with pytest.raises(TypeError, match=r"^runs.rows: .*torch.int32 \[4, M\]"):
            prefix_attention(qkv, wide)
        flat = PackedRuns(runs.offsets, runs.rows[:1], 1, 3, 3)
        with pytest.raises(ValueError, match=r"^runs.rows: expected a shape \[4, M\]"):
            prefix_attention(qkv, flat)
        apart = PackedRuns(runs.offsets, runs.rows.to("meta"), 1, 3, 3)
        with pytest.raises(ValueError, match="^runs.rows: expected device cpu"):
            prefix_attention(qkv, apart)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
    def test_of_the_scale(self, scale):
        qkv, runs = problem([3], [2, 3])
        with pytest.raises(ValueError, match="^scale: "):
            prefix_attention(qkv, runs, scale=scale)

    def test_of_a_scale_that_would_get_no_gradient(self):
        qkv, runs = problem([3], [2, 3])
        with pytest.raises(ValueError, match=r"^scale: .*pass scale.detach\(\)"):
            prefix_attention(qkv, runs, scale=torch.tensor(0.5, requires_grad=True))

    @needs_kernel
    def test_the_op_itself_takes_no_fp64_for_fp32(self):
        qkv, runs = problem([3], [2, 3], dtype=F64)
        with pytest.raises(TypeError, match="^qkv: expected float32, bfloat16 or float16"):
            raw(qkv, runs)
        others = (None, None, runs.offsets, runs.rows, runs.prefixes, 1.0)
        with pytest.raises(TypeError, match="^qkv: expected float32, bfloat16 or float16"):
            torch.ops.vlfast.prefix_attention_backward(qkv[:, 0], qkv, *others)

    @needs_kernel
    @pytest.mark.parametrize(
        ("offsets", "prefixes"),
        [
            ([], 0),
            ([0], 0),
            ([0, 9], 0),
            ([1, 8], 0),
            ([0, 5, 4, 8], 0),
            ([0, 4, 8], 3),
            ([0, 2, 4, 8], 2),
            ([0, 8], -1),
        ],
    )
    def test_offsets_that_are_no_runs_do_no_harm(self, offsets, prefixes):
        qkv, runs = problem([3], [2, 3], dtype=F32)
        offsets = torch.tensor(offsets, dtype=torch.int32)
        with pytest.raises(ValueError, match="^offsets: "):
            torch.ops.vlfast.prefix_attention(qkv, offsets, runs.rows, prefixes, 1.0)
        with pytest.raises(ValueError, match="^offsets: "):
            torch.ops.vlfast.prefix_attention_backward(
                qkv[:, 0], qkv, None, None, offsets, runs.rows, prefixes, 1.0
            )
