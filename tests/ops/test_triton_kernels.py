"""The Triton kernels: their numbers, on a GPU or in Triton's interpreter, and their machine code.

Whether kernels are interpreted is settled when triton is imported. So a session without
TRITON_INTERPRET=1 compiles them, and starts another one with it, which checks the numbers.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.ops.support import assert_close, normal
from vlfast.ops import reference
from vlfast.ops.packed_runs import PackedRuns
from vlfast.ops.prefix_attention import prefix_attention_backward_cuda, prefix_attention_cuda

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

from vlfast.ops.triton import gated_mixture as kernels  # noqa: E402
from vlfast.ops.triton import prefix_attention  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = (
    "distillation",
    "selection",
    "distillation_to_student",
    "distillation_to_scores",
    "selection_to_scores",
)

needs_numbers = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="there is no GPU: test_the_numbers_in_the_interpreter runs this",
)
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")


def problem(
    batch=5, heads=4, classes=7, width=8, top_k=2, dtypes=(F32,) * 4, device=DEVICE, **more
):
    """Arguments of the kernel. dtypes: of images, gate, texts and student."""
    images, texts = normal(batch, width, seed=1), normal(heads, classes, width, seed=2)
    images, texts = (torch.nn.functional.normalize(x, dim=-1) for x in (images, texts))
    arguments = dict(
        image_features=images,
        gate=normal(width, heads, seed=3),
        hard_text_features=texts,
        student_logits=normal(batch, classes, seed=4, scale=5.0),
    )
    arguments = {n: x.to(device, t) for (n, x), t in zip(arguments.items(), dtypes, strict=True)}
    labels = (torch.arange(batch) * 3 % classes).to(device)
    return arguments | dict(
        labels=labels, logit_scale=20.0, temperature=1.0, top_k=top_k, with_gradient=True, **more
    )


def computed(arguments):
    """The results by name, from memory that held NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        return dict(zip(NAMES, kernels.gated_mixture(**arguments), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def by_reference(arguments, dtype):
    """The same results by the reference in this dtype.

    Its gradients to the scores are those to a gate with one more feature for each image.
    """
    floating = ("image_features", "gate", "hard_text_features", "student_logits")
    image, gate, texts, student = (arguments[name].to(dtype) for name in floating)
    batch, (width, heads), classes = len(image), gate.shape, texts.shape[1]
    image = torch.cat([image, torch.eye(batch, dtype=dtype, device=image.device)], 1)
    gate = torch.cat([gate, gate.new_zeros(batch, heads)]).requires_grad_()
    texts = torch.cat([texts, texts.new_zeros(heads, classes, batch)], 2)
    student = student.detach().requires_grad_()
    numbers = [arguments[name] for name in ("labels", "logit_scale", "temperature", "top_k")]
    distillation, selection = reference.gated_mixture(image, gate, texts, student, *numbers)
    to_student, to_gate = torch.autograd.grad(
        distillation.sum(), (student, gate), retain_graph=True
    )
    (selection_to_gate,) = torch.autograd.grad(selection.sum(), gate)
    results = (distillation, selection, to_student, to_gate[width:], selection_to_gate[width:])
    return dict(zip(NAMES, (x.detach() for x in results), strict=True))


def largest(x):
    return float(x.abs().max())


def assert_as_good_as_the_reference(arguments, slack=8e-7):
    """Within three times the error of the fp32 reference, and a few roundings."""
    actual, exact, rounded = (
        computed(arguments),
        by_reference(arguments, torch.float64),
        by_reference(arguments, F32),
    )
    for name in NAMES:
        assert actual[name].dtype == F32
        assert actual[name].shape == exact[name].shape
        error = largest(actual[name].double() - exact[name])
        allowed = 3 * largest(rounded[name].double() - exact[name]) + slack * largest(exact[name])
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
    return actual


def assert_same(actual, expected, rows=slice(None)):
    for name in NAMES:
        assert torch.equal(actual[name][rows], expected[name][rows]), name


@pytest.fixture(autouse=INTERPRETED)
def bf16_products(monkeypatch):
    """The interpreter holds bf16 as bits, and its dot would multiply those as integers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *others):
        a, b = (
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return dot(self, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@needs_numbers
class TestNumbers:
    @pytest.mark.parametrize(
        ("batch", "heads", "classes", "width", "top_k", "dtypes", "temperature"),
        [
            (1, 1, 1, 1, 1, (F32,) * 4, 1.0),
            (7, 12, 257, 65, 2, (F32,) * 4, 2.0),
            (7, 12, 257, 65, 2, (F16,) * 4, 0.5),
            (7, 12, 257, 65, 2, (BF16,) * 4, 4.0),
            (7, 12, 1000, 512, 2, (F16, F32, F16, F16), 1.0),
            (1, 36, 257, 8, 36, (BF16, F32, BF16, F32), 1.0),
            (33, 12, 3, 8, 12, (F16, F32, BF16, F16), 3.0),
            (33, 36, 10, 1, 2, (F32, BF16, F16, F32), 1.0),
            (33, 1, 3, 65, 1, (F16, F16, F32, BF16), 1.0),
            (2, 12, 3, 600, 3, (F32,) * 4, 1.0),
            (1, 3, 2100, 8, 3, (F32,) * 4, 1.0),
        ],
    )
    def test_as_good_as_the_reference(
        self, batch, heads, classes, width, top_k, dtypes, temperature
    ):
        arguments = problem(batch, heads, classes, width, top_k, dtypes)
        assert_as_good_as_the_reference(arguments | dict(temperature=temperature))

    def test_scale_of_a_hundred_with_offset_students(self):
        arguments = problem(7, 5, 100, 32, 3)
        arguments["logit_scale"] = 100.0
        arguments["student_logits"] = arguments["student_logits"] * 4 + 50
        assert_as_good_as_the_reference(arguments)

    def test_classes_that_are_all_but_impossible(self):
        """Row by row: the losses lie 30 orders of magnitude apart."""
        arguments = problem(7, 5, 40, 32, 3)
        arguments["student_logits"][:4, ::3] = -1e30
        arguments["student_logits"][2, 1:] = -1e4
        arguments["logit_scale"] = 1000.0
        for row in range(7):
            alone = {
                name: arguments[name][row : row + 1]
                for name in ("image_features", "student_logits", "labels")
            }
            actual = assert_as_good_as_the_reference(arguments | alone)
            assert all(x.isfinite().all() for x in actual.values())

    def test_students_close_to_their_teacher(self):
        arguments = problem(7, 1, 300, 32, 1)
        teacher = 20.0 * arguments["image_features"] @ arguments["hard_text_features"][0].T
        noise = normal(7, 300, seed=5, scale=1e-3, dtype=F32).to(DEVICE)
        arguments["student_logits"] = teacher + noise
        actual = assert_as_good_as_the_reference(arguments)
        assert (actual["distillation"] > 0).all()

    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_students_equal_to_their_teacher(self, temperature):
        """Over several blocks of classes, beside another teacher."""
        arguments = problem(2, 2, 2100, 1, 2)
        arguments["image_features"].fill_(1)
        arguments["gate"].zero_()
        arguments["hard_text_features"] = normal(2, 2100, 1, seed=5, dtype=F32).to(DEVICE)
        arguments["hard_text_features"][1] = arguments["hard_text_features"][0]
        student = 4 * arguments["hard_text_features"][0, :, 0]
        arguments["student_logits"] = student.expand(2, -1)
        actual = computed(arguments | dict(logit_scale=4.0, temperature=temperature))
        for name in NAMES:
            if name != "selection":
                assert (actual[name] == 0).all(), name

    @pytest.mark.parametrize("top_k", [1, 2, 4])
    def test_ties_go_to_the_smaller_index(self, top_k):
        arguments = problem(3, 4, top_k=top_k)
        arguments["gate"] = arguments["gate"][:, [0, 0, 1, 1]]
        assert_as_good_as_the_reference(arguments)
        arguments["gate"] = torch.zeros_like(arguments["gate"])
        actual = assert_as_good_as_the_reference(arguments)
        assert (actual["selection_to_scores"][:, top_k:] == 0).all()

    def test_many_images_of_one_head(self, monkeypatch):
        """Several tiles of a product, and several blocks of the list of images."""
        monkeypatch.setattr(kernels, "LISTED_IMAGES", 16)
        arguments = problem(70, 3, 5)
        arguments["gate"] = torch.zeros_like(arguments["gate"])
        assert_as_good_as_the_reference(arguments)

    @pytest.mark.parametrize("label", [-1, 7, 2**40])
    def test_a_label_out_of_range(self, label):
        arguments = problem()
        expected = computed(arguments)
        arguments["labels"] = arguments["labels"].clone()
        arguments["labels"][1] = label
        actual = computed(arguments)
        assert_same(actual, expected, [0, 2, 3, 4])
        for name in NAMES[:1] + NAMES[2:4]:
            assert torch.equal(actual[name], expected[name])
        assert actual["selection"][1].isnan()
        assert actual["selection_to_scores"][1].isnan().sum() == 2

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("which", ["image_features", "student_logits"])
    def test_what_is_not_finite_stays_in_its_row(self, which, value):
        arguments = problem()
        expected = computed(arguments)
        arguments[which] = arguments[which].clone()
        arguments[which][1, 2] = value
        actual = computed(arguments)
        assert_same(actual, expected, [0, 2, 3, 4])
        assert actual["distillation"][1].isnan()
        assert actual["distillation_to_student"][1].isnan().all()
        assert actual["distillation_to_scores"][1].isnan().sum() == 2
        if which == "image_features":
            assert actual["selection"][1].isnan()
            assert actual["selection_to_scores"][1].isnan().sum() == 2
        else:
            assert torch.equal(actual["selection"], expected["selection"])
            assert torch.equal(actual["selection_to_scores"], expected["selection_to_scores"])

    def test_a_prompt_that_is_not_finite_stays_with_who_selected_it(self):
        arguments = problem(9)
        expected = computed(arguments)
        selected = expected["selection_to_scores"][:, 1] != 0
        assert 0 < selected.sum() < 9
        # Minus infinity for some images, plus infinity for others.
        arguments["hard_text_features"] = arguments["hard_text_features"].clone()
        arguments["hard_text_features"][1, 3, 0] = torch.inf
        actual = computed(arguments)
        assert_same(actual, expected, ~selected)
        for name in ("distillation", "selection"):
            assert torch.equal(actual[name].isnan(), selected)
        assert torch.equal(actual["distillation_to_student"].isnan().all(1), selected)

    @pytest.mark.parametrize("dtype", [torch.float64, F32, F16])
    def test_numbers_as_tensors(self, dtype):
        arguments = problem()
        expected = computed(arguments | dict(temperature=2.0))
        arguments["temperature"] = torch.tensor(2.0, dtype=dtype, device=DEVICE)
        arguments["logit_scale"] = torch.tensor(20.0, dtype=dtype, device=DEVICE)
        assert_same(computed(arguments), expected)

    def test_without_gradient(self):
        arguments = problem()
        expected = computed(arguments)
        actual = computed(arguments | dict(with_gradient=False))
        for name in NAMES[:2]:
            assert torch.equal(actual[name], expected[name])
        for name in NAMES[2:]:
            assert actual[name].shape == (0, 0)
            assert actual[name].dtype == F32

    def test_views_are_read_as_they_are_and_nothing_is_written(self):
        arguments = problem()
        expected = computed(arguments)
        views = dict(arguments)
        for name in ("image_features", "gate", "hard_text_features", "student_logits"):
            views[name] = arguments[name].mT.contiguous().mT
            assert not views[name].is_contiguous()
        views["labels"] = arguments["labels"].repeat_interleave(2)[::2]
        before = {name: x.clone() for name, x in views.items() if isinstance(x, torch.Tensor)}
        assert_same(computed(views), expected)
        assert all(torch.equal(views[name], x) for name, x in before.items())

    def test_a_row_depends_on_itself_alone(self):
        arguments = problem(33, 5, 70, 65, 3)
        together = computed(arguments)
        for name in ("image_features", "student_logits", "labels"):
            arguments[name] = arguments[name][20:22]
        apart = computed(arguments)
        for name in NAMES:
            assert torch.equal(together[name][20:22], apart[name]), name

    def test_no_images(self):
        actual = computed(problem(0))
        assert [tuple(actual[name].shape) for name in NAMES] == [(0,), (0,), (0, 7), (0, 4), (0, 4)]


def attention_problem(prefixes, suffixes, heads=2, width=8, dtype=F32, device=DEVICE):
    """(upstream gradient, qkv, runs, scale)."""
    runs = PackedRuns.of(prefixes, suffixes)
    count = runs.rows.shape[1]
    upstream, qkv = normal(count, heads, width, seed=2), normal(count, 3, heads, width, seed=1)
    return upstream.to(device, dtype), qkv.to(device, dtype), runs.to(device), width**-0.5


def attention(upstream, qkv, runs, scale):
    """(output, log_normaliser, gradient to qkv), from memory that held NaN."""
    layout = (runs.offsets, runs.rows, runs.prefixes, scale)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        forward = prefix_attention.prefix_attention_forward(qkv, *layout)
        grad_qkv = prefix_attention.prefix_attention_backward(upstream, qkv, *forward, *layout)
        return *forward, grad_qkv
    finally:
        torch.use_deterministic_algorithms(False)


def who_sees_whom(runs):
    """bool [M, M]: whether the row of a query sees that of a key."""
    run_start, _, prefix_start, prefix_end = (x[:, None] for x in runs.rows.long())
    key = torch.arange(len(run_start), device=run_start.device)
    of_run = (run_start <= key) & (key <= key[:, None])
    return of_run | ((prefix_start <= key) & (key < prefix_end))


@needs_numbers
class TestPrefixAttention:
    @pytest.mark.parametrize(
        ("prefixes", "suffixes", "heads", "width", "dtype"),
        [
            ([1], [1], 1, 1, F32),
            ([4], [3, 1, 5], 2, 8, F16),
            ([3, 5], [2, 0, 3, 4], 2, 8, F32),
            ([0], [2, 2], 2, 8, F32),
            ([0, 2, 0], [], 2, 8, F32),
            ([], [3, 0, 1], 2, 8, F32),
            ([], [40, 50], 1, 8, BF16),
            ([17], [], 2, 8, F32),
            ([17], [4, 3, 0, 6] * 3, 1, 64, F32),
            ([17], [4, 3, 0, 6] * 3, 1, 64, F16),
            ([17], [4, 3, 0, 6] * 3, 1, 64, BF16),
            ([17], [4, 3, 6], 3, 80, F32),
            ([17], [4, 3, 6], 3, 80, BF16),
            ([5], [4, 7], 1, 256, F32),
            ([5], [4, 7], 1, 256, F16),
            # Several blocks of keys of a prefix, whose queries are split.
            ([77], [5, 0, 3] * 60, 1, 8, BF16),
            ([40], [5, 0, 3] * 40, 1, 4, F32),
            # So many rows of prefixes that there is room for one split.
            ([110], [2] * 40, 1, 16, F16),
            ([1], [20] * 14, 1, 16, F32),
            ([3], [77, 1, 76], 1, 16, F16),
            # A block of rows sees many prefixes.
            ([3, 0, 4, 1] * 6, [2, 1] * 24, 1, 16, F32),
            ([3, 0, 40], [2, 0, 35, 4] * 3, 1, 16, BF16),
        ],
    )
    def test_the_numbers(self, prefixes, suffixes, heads, width, dtype):
        upstream, qkv, runs, scale = attention_problem(prefixes, suffixes, heads, width, dtype)
        output, log_normaliser, grad_qkv = attention(upstream, qkv, runs, scale)
        leaf = qkv.double().requires_grad_()
        expected = reference.prefix_attention(leaf, runs, scale)
        (expected_gradient,) = torch.autograd.grad(expected, leaf, upstream.double())
        scores = torch.einsum("qhe,khe->qhk", leaf[:, 0], leaf[:, 1]) * scale
        scores = scores.masked_fill(~who_sees_whom(runs)[:, None], -torch.inf)

        assert (output.dtype, log_normaliser.dtype, grad_qkv.dtype) == (dtype, F32, dtype)
        # In half precision weights and their gradients are rounded before they are multiplied.
        tolerance = {F32: 2e-6, F16: 1e-3, BF16: 8e-3}[dtype]
        assert_close(output, expected, tolerance)
        assert_close(log_normaliser, scores.logsumexp(-1), 2e-6)
        for part in range(3):
            assert_close(grad_qkv[:, part], expected_gradient[:, part], 2 * tolerance)

    def test_scale_and_large_scores(self):
        upstream, qkv, runs, _ = attention_problem([3], [2, 4], dtype=F32)
        qkv[:, :2] *= 6
        output, _, grad_qkv = attention(upstream, qkv, runs, 1.0)
        leaf = qkv.double().requires_grad_()
        expected = reference.prefix_attention(leaf, runs, 1.0)
        assert_close(output, expected, 1e-4)
        assert_close(grad_qkv, torch.autograd.grad(expected, leaf, upstream.double())[0], 1e-4)

    def test_the_gradient_of_a_prefix_however_it_is_split(self, monkeypatch):
        problem = attention_problem([5], [4] * 70, 1, 16)
        *_, split = attention(*problem)
        monkeypatch.setattr(prefix_attention, "MOST_SPLITS", 1)
        *_, whole = attention(*problem)
        assert not torch.equal(split[:5], whole[:5])
        assert_close(split, whole, 2e-6)

    @pytest.mark.parametrize(
        ("value", "dtype"), [(torch.nan, F32), (-torch.inf, F16), (torch.inf, BF16)]
    )
    @pytest.mark.parametrize("row", [1, 7])
    @pytest.mark.parametrize("part", [0, 1, 2, 3])
    def test_what_is_not_finite_stays_with_who_sees_it(self, part, row, value, dtype):
        """In a query, a key, a value or an upstream gradient, of a prefix or of a run."""
        upstream, qkv, runs, scale = attention_problem([2, 2], [3, 4, 1, 2], dtype=dtype)
        expected = attention(upstream, qkv, runs, scale)
        qkv, upstream = qkv.clone(), upstream.clone()
        if part < 3:
            qkv[row, part, 1, 2] = value
        else:
            upstream[row, 1, 2] = value
        actual = attention(upstream, qkv, runs, scale)

        sees = who_sees_whom(runs)
        broken = sees[:, row] if part in (1, 2) else torch.arange(len(qkv), device=DEVICE) == row
        seen_by_broken = sees[broken].any(0)
        assert 0 < broken.sum() < len(qkv)
        assert seen_by_broken.sum() < len(qkv)
        broken_gradient = torch.stack([broken, seen_by_broken, seen_by_broken], 1)
        broken_output = broken & (part < 3)
        for index, where in enumerate([broken_output, broken_output, broken_gradient]):
            a, e = actual[index], expected[index]
            if index == 1:
                a, e = a[..., None], e[..., None]
            assert torch.equal(a[..., 0, :], e[..., 0, :])
            assert torch.equal(a[..., 1, :][~where], e[..., 1, :][~where])
            assert not a[..., 1, :][where].isfinite().any()

    def test_nothing_is_written_and_views_are_read_as_they_are(self):
        upstream, qkv, runs, scale = attention_problem([3], [2, 4])
        expected = attention(upstream, qkv, runs, scale)
        views = [x.mT.contiguous().mT for x in (upstream, qkv)]
        before = [x.clone() for x in (*views, runs.offsets, runs.rows)]
        for a, e in zip(attention(*views, runs, scale), expected, strict=True):
            assert torch.equal(a, e)
        for x, was in zip((*views, runs.offsets, runs.rows), before, strict=True):
            assert torch.equal(x, was)

    def test_the_op_calls_them_so(self):
        """With an upstream gradient in another dtype than the output's, too."""
        upstream, qkv, runs, scale = attention_problem([3, 2], [2, 4], dtype=F16)
        expected = attention(upstream, qkv, runs, scale)
        layout = (runs.offsets, runs.rows, runs.prefixes, scale)
        forward = prefix_attention_cuda(qkv, *layout)
        gradient = prefix_attention_backward_cuda(upstream.float(), qkv, *forward, *layout)
        for a, e in zip((*forward, gradient), expected, strict=True):
            assert a.dtype == e.dtype and torch.equal(a, e)

    def test_no_rows(self):
        output, log_normaliser, grad_qkv = attention(*attention_problem([0], [0, 0]))
        assert output.shape == (0, 2, 8)
        assert log_normaliser.shape == (0, 2)
        assert grad_qkv.shape == (0, 3, 2, 8)


@needs_compiler
@pytest.mark.parametrize("numbers", ["TestNumbers", "TestPrefixAttention"])
def test_the_numbers_in_the_interpreter(numbers):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"{__file__}::{numbers}",
        ],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """compiled(arch, function, ...): what the launches of the function compile to, by name."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    results = {}

    def compile_instead(kernel, grid):
        def launch(*arguments, **options):
            assert 0 < grid[0] < 2**31 and all(0 < size < 2**16 for size in grid[1:])
            results[kernel.__name__] = kernel.run(*arguments, grid=grid, warmup=True, **options)

        return launch

    def compiled(arch, function, *arguments, **named):
        # Triton keeps what it compiled by device: the number of none there is.
        driver = SimpleNamespace(
            get_current_device=lambda: 1000 + arch,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
        )
        results.clear()
        with monkeypatch.context() as patched:
            patched.setattr(triton.runtime.driver, "_active", driver)
            patched.setattr(triton.runtime.jit.JITFunction, "__getitem__", compile_instead)
            function(*arguments, **named)
        return dict(results)

    return compiled


def resources(kernel):
    """What cuobjdump says of the machine code, as {"REG": 64, "STACK": 0, ...}."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in said.splitlines() if "REG:" in line]
    pairs = [word.split(":") for word in line.split() if word.count(":") == 1]
    return {name: int(value) for name, value in pairs}


def check_machine_code(name, kernel):
    """It is there, spills no register, and leaves room in the shared memory for more blocks."""
    assert kernel.asm["cubin"].startswith(b"\x7fELF"), name
    used = resources(kernel)
    assert 0 < used["REG"] < 255, name
    assert used["STACK"] == used["LOCAL"] == 0, name
    assert kernel.metadata.shared <= 48 * 1024, name


@needs_compiler
@pytest.mark.parametrize("arch", [80, 90])
class TestMachineCode:
    @pytest.mark.parametrize(
        ("batch", "heads", "classes", "width", "top_k", "dtypes"),
        [
            (128, 12, 1000, 512, 2, (F16, F32, F16, F16)),
            (128, 12, 1000, 512, 3, (BF16, BF16, BF16, BF16)),
            (128, 12, 1000, 512, 1, (F32, F32, F32, F32)),
            (7, 36, 257, 65, 36, (F16, F32, F32, F32)),
            (7, 12, 257, 65, 5, (F16, F32, F16, BF16)),
            (1, 1, 1, 1, 1, (F16, F32, BF16, F32)),
        ],
    )
    def test_nothing_spills(self, compiled, arch, batch, heads, classes, width, top_k, dtypes):
        arguments = problem(batch, heads, classes, width, top_k, dtypes, "cpu")
        results = compiled(arch, kernels.gated_mixture, **arguments)
        assert list(results) == [
            "select_heads",
            "list_images",
            "multiply_selected",
            "compare_with_student",
        ]
        for name, kernel in results.items():
            check_machine_code(name, kernel)
        halves = dtypes[0] == dtypes[2] != F32
        assert ("mma" in results["multiply_selected"].asm["ptx"]) == halves

    def test_numbers_as_tensors_and_no_gradient(self, compiled, arch):
        arguments = problem(device="cpu", dtypes=(F16, F32, F16, F16))
        for name in ("logit_scale", "temperature"):
            arguments[name] = torch.tensor(2.0, dtype=F16)
        arguments |= dict(with_gradient=False)
        for name, kernel in compiled(arch, kernels.gated_mixture, **arguments).items():
            assert kernel.asm["cubin"].startswith(b"\x7fELF"), name
            assert resources(kernel)["STACK"] == 0, name

    @pytest.mark.parametrize(
        ("prefixes", "suffixes", "heads", "width", "dtype"),
        [
            ([17], [4] * 1000, 8, 64, F32),
            ([17], [4] * 1000, 12, 64, F16),
            ([17], [4] * 1000, 8, 64, BF16),
            ([17], [4] * 1000, 4, 128, F32),
            ([17], [4] * 1000, 4, 128, F16),
            ([17], [4] * 1000, 4, 128, BF16),
            ([], [4] * 16, 8, 64, F16),
        ],
    )
    def test_prefix_attention_spills_nothing_and_reads_nothing_back(
        self, compiled, arch, prefixes, suffixes, heads, width, dtype
    ):
        """On tensors without data, from which the host can read nothing."""
        upstream, qkv, runs, scale = attention_problem(
            prefixes, suffixes, heads, width, dtype, "meta"
        )
        layout = (runs.offsets, runs.rows, runs.prefixes, scale)
        forward = (torch.empty_like(upstream), torch.empty(upstream.shape[:2], device="meta"))
        results = compiled(arch, prefix_attention.prefix_attention_forward, qkv, *layout)
        assert list(results) == ["attend"]
        results |= compiled(
            arch, prefix_attention.prefix_attention_backward, upstream, qkv, *forward, *layout
        )
        assert list(results)[1:] == ["differentiate", "add_sums"][: 1 + (len(prefixes) == 1)]
        for name, kernel in results.items():
            check_machine_code(name, kernel)
            assert ("mma" in kernel.asm["ptx"]) == (dtype != F32 and name != "add_sums"), name
