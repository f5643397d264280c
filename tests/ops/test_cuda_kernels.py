"""The CUDA kernels, run on the CPU by tests/cuda_emulator, against their definitions in fp64."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from tests import cuda_emulator
from tests.ops.support import assert_as_precise, assert_close, normal
from vlfast.ops import reference

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="needs g++")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {F32: 0, F64: 1, BF16: 2, F16: 3}
NAN = float("nan")
SANITIZE = "VLFAST_TEST_SANITIZED"


class Device(ctypes.Structure):
    _fields_ = [
        ("multiprocessors", ctypes.c_int),
        ("shared_per_block", ctypes.c_int),
        ("shared_per_multiprocessor", ctypes.c_int),
        ("schedule", ctypes.c_int),
    ]


class SymmetricKL(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("student", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("teacher_classes", ctypes.c_int64),
        ("student_factor", ctypes.c_double),
        ("teacher_factor", ctypes.c_double),
        ("student_scale", ctypes.c_void_p),
        ("teacher_scale", ctypes.c_void_p),
        ("forward_weight", ctypes.c_double),
        ("reverse_weight", ctypes.c_double),
        ("loss", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("gradient_of_scale", ctypes.c_void_p),
    ]


class Emulator:
    def __init__(self, library):
        self.library = library
        self.library.symmetric_kl.restype = ctypes.c_char_p
        self.library.perplexity.restype = ctypes.c_char_p
        self.library.mistake.restype = ctypes.c_char_p
        self.library.perplexity_workspace.restype = ctypes.c_size_t
        self.use()

    def use(self, multiprocessors=4, shared_per_block=232448, schedule=0):
        """As an H100 with fewer multiprocessors, unless told otherwise."""
        of_multiprocessor = shared_per_block + 1024
        device = Device(multiprocessors, shared_per_block, of_multiprocessor, schedule)
        self.library.set_device(ctypes.byref(device))

    def run(self, name, *arguments):
        error = getattr(self.library, name)(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())


@pytest.fixture(scope="session")
def built_emulator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_emulator")
    return Emulator(cuda_emulator.build(folder, sanitize=SANITIZE in os.environ))


@pytest.fixture
def emulator(built_emulator):
    built_emulator.use()
    return built_emulator


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def poisoned(*shape, dtype=F32):
    return torch.full(shape, NAN, dtype=dtype)


def symmetric_kl(
    emulator,
    student,
    teacher,
    index=None,
    factors=(1.0, 1.0),
    scales=(None, None),
    weights=(0.5, 0.5),
    gradient=True,
):
    """Losses [B], gradient [B, K] and gradient to the scale [B], or just the losses."""
    rows, classes = student.shape
    dtype = F64 if student.dtype == F64 else F32
    outputs = [poisoned(rows, dtype=dtype)]
    if gradient:
        of_student = BF16 if student.dtype == BF16 else dtype
        outputs += [poisoned(rows, classes, dtype=of_student), poisoned(rows, dtype=dtype)]
    problem = SymmetricKL(
        dtype=DTYPES[student.dtype],
        student=address(student),
        teacher=address(teacher),
        index=address(index),
        rows=rows,
        classes=classes,
        teacher_classes=teacher.shape[1],
        student_factor=factors[0],
        teacher_factor=factors[1],
        student_scale=address(scales[0]),
        teacher_scale=address(scales[1]),
        forward_weight=weights[0],
        reverse_weight=weights[1],
        loss=address(outputs[0]),
        gradient=address(outputs[1]) if gradient else None,
        gradient_of_scale=address(outputs[2]) if gradient else None,
    )
    emulator.run("symmetric_kl", ctypes.byref(problem))
    return outputs


def exact_symmetric_kl(
    student, teacher, scale, teacher_scale, index=None, weights=(0.5, 0.5), dtype=F64
):
    student = student.to(dtype).requires_grad_()
    scale = torch.full((len(student), 1), scale, dtype=dtype, requires_grad=True)
    losses = reference.symmetric_kl(
        student * scale,
        teacher.to(dtype),
        teacher_scale=teacher_scale,
        forward_weight=weights[0],
        reverse_weight=weights[1],
        index=index,
    )
    gradients = torch.autograd.grad(losses.sum(), [student, scale])
    return [losses.detach(), gradients[0], gradients[1][:, 0]]


def assert_all_close(actual, expected, tolerance):
    for mine, true in zip(actual, expected, strict=True):
        resolution = 2**-8 if mine.dtype == BF16 else 0
        assert_close(mine, true, tolerance + resolution)


def pair(rows, classes, dtype, teacher_classes=None, distance=0.1):
    student = normal(rows, classes, scale=0.1)
    if teacher_classes is not None:
        return student.to(dtype), normal(rows, teacher_classes, seed=1, scale=0.1).to(dtype)
    return student.to(dtype), (student + normal(rows, classes, seed=1, scale=distance)).to(dtype)


class TestEmulator:
    """It finds the mistakes that it is there to find; the sanitizers find the accesses."""

    MISTAKES = (
        "none",
        "no barrier",
        "barrier of some",
        "exit before barrier",
        "two barriers",
        "shuffle of some",
        "uninitialised",
        "no wait",
        "out of bounds",
        "too much memory",
    )

    def make(self, emulator, mistake):
        values, result = torch.arange(64.0), poisoned(64)
        pointers = [ctypes.c_void_p(address(x)) for x in (values, result)]
        emulator.run("mistake", *pointers, self.MISTAKES.index(mistake))
        return torch.equal(result, values.flip(0))

    def test_no_mistake(self, emulator):
        for schedule in range(4):
            emulator.use(schedule=schedule)
            assert self.make(emulator, "none")

    @pytest.mark.parametrize("mistake", ["no barrier", "uninitialised", "no wait"])
    def test_wrong_results(self, emulator, mistake):
        right = []
        for schedule in range(4):
            emulator.use(schedule=schedule)
            right.append(self.make(emulator, mistake))
        assert not all(right)

    @pytest.mark.parametrize(
        ("mistake", "message"),
        [
            ("barrier of some", "40 of 64 at barrier 0"),
            ("exit before barrier", "40 of 64 at barrier 0"),
            ("two barriers", "threads meet at barrier 0 from lines"),
            ("shuffle of some", "lanes of a warp"),
            ("too much memory", "more shared memory than"),
        ],
    )
    def test_errors(self, emulator, mistake, message):
        with pytest.raises(RuntimeError, match=message):
            self.make(emulator, mistake)
        assert self.make(emulator, "none")


class TestSymmetricKL:
    @pytest.mark.parametrize(
        "shape", [(2, 1), (5, 3), (3, 7), (2, 513), (4, 1000), (3, 1026), (2, 20930)], ids=str
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_accuracy(self, emulator, dtype, shape):
        student, teacher = pair(*shape, dtype)
        actual = symmetric_kl(emulator, student, teacher, factors=(100.0, 80.0))
        tolerance = 1e-12 if dtype == F64 else 5e-6
        assert_all_close(actual, exact_symmetric_kl(student, teacher, 100.0, 80.0), tolerance)
        alone = symmetric_kl(emulator, student, teacher, factors=(100.0, 80.0), gradient=False)
        assert torch.equal(alone[0], actual[0])

    @pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)], ids=str)
    def test_weights_and_scale_pointers(self, emulator, weights):
        student, teacher = pair(4, 37, F32)
        scales = torch.tensor(20.0), torch.tensor(4.0)
        actual = symmetric_kl(
            emulator, student, teacher, factors=(0.5, 2.0), scales=scales, weights=weights
        )
        expected = exact_symmetric_kl(student, teacher, 10.0, 8.0, weights=weights)
        # The gradient to the scale is that to factor times value.
        assert_all_close(actual, expected, 5e-6)

    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    def test_negative_scales(self, emulator, dtype):
        student, teacher = pair(3, 1001, dtype)
        actual = symmetric_kl(emulator, student, teacher, factors=(-50.0, -30.0))
        tolerance = 1e-12 if dtype == F64 else 5e-6
        assert_all_close(actual, exact_symmetric_kl(student, teacher, -50.0, -30.0), tolerance)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_index(self, emulator, dtype):
        student, teacher = pair(3, 300, dtype, teacher_classes=41)
        index = torch.arange(300) * 7 % 41
        actual = symmetric_kl(emulator, student, teacher, index, factors=(30.0, 30.0))
        tolerance = 1e-12 if dtype == F64 else 5e-6
        expected = exact_symmetric_kl(student, teacher, 30.0, 30.0, index)
        assert_all_close(actual, expected, tolerance)

    @pytest.mark.parametrize("column", [-1, 41, 2**40, -(2**62)])
    def test_index_outside_the_teacher(self, emulator, column):
        student, teacher = pair(3, 300, F32, teacher_classes=41)
        index = torch.arange(300) % 41
        index[123] = column
        for result in symmetric_kl(emulator, student, teacher, index):
            assert result.isnan().all()

    def test_misaligned_rows(self, emulator):
        student, teacher = (x.flatten() for x in pair(5, 64, F16))
        student, teacher = student[1:257].view(4, 64), teacher[3:259].view(4, 64)
        actual = symmetric_kl(emulator, student, teacher, factors=(9.0, 9.0))
        assert_all_close(actual, exact_symmetric_kl(student, teacher, 9.0, 9.0), 5e-6)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_equal_sides_have_no_loss(self, emulator, dtype):
        student, _ = pair(3, 1000, dtype)
        for result in symmetric_kl(emulator, student, student, factors=(70.0, 70.0)):
            assert torch.equal(result, torch.zeros_like(result))

    @pytest.mark.parametrize("position", [0, 20, 36])
    @pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
    @pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
    def test_bad_values_stay_in_their_row(self, emulator, value, side, position):
        sides = pair(4, 37, F32)
        good = symmetric_kl(emulator, *sides)
        sides[side][2, position] = value
        for before, after in zip(good, symmetric_kl(emulator, *sides), strict=True):
            assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
            assert after[2].isnan().all()

    @pytest.mark.parametrize("classes", [3, 9, 64, 1500])
    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    def test_a_student_without_doubt_has_no_gradient(self, emulator, dtype, classes):
        """Whatever the teacher says of the class, it is the mean of the gaps."""
        student, teacher = torch.zeros(2, classes, dtype=dtype), torch.zeros(2, classes).to(dtype)
        student[:, classes // 3], teacher[:, -1], teacher[:, -2] = 1e4, 3, 7e3
        actual = symmetric_kl(emulator, student, teacher, weights=(0.0, 1.0))
        assert not actual[1].any() and not actual[2].any()
        assert_close(actual[0], exact_symmetric_kl(student, teacher, 1, 1, weights=(0, 1))[0], 1e-6)

    @pytest.mark.parametrize(
        ("dtype", "size"), [(F32, 1e30), (F32, 3.4e37), (F64, 1e300), (BF16, 1e30)], ids=str
    )
    def test_huge_logits(self, emulator, dtype, size):
        student = torch.tensor([[10.0, 0, 0], [0, 0, 10], [0, 10, 0]], dtype=F64).mul(size)
        teacher = torch.tensor([[0, 7.0, 0]], dtype=F64).mul(size).expand(3, 3)
        actual = symmetric_kl(emulator, student.to(dtype), teacher.to(dtype).contiguous())
        expected = torch.tensor([[0.5, -0.5, 0], [0, -0.5, 0.5], [0, 0, 0]])
        assert torch.equal(actual[1].float(), expected)

    @pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
    def test_masks_of_the_lowest_number(self, emulator, dtype):
        """Also of the class that is the other side's top."""
        student, teacher = pair(4, 37, dtype)
        lowest = torch.finfo(dtype).min
        student[:, 3] = student[:, 20] = teacher[:, 20] = teacher[:, 36] = lowest
        teacher[torch.arange(4), student.argmax(1)] = lowest
        actual = symmetric_kl(emulator, student, teacher)
        expected = exact_symmetric_kl(student, teacher, 1.0, 1.0)
        assert_all_close(actual[:2], expected[:2], 1e-6)

    @pytest.mark.parametrize("shape", [(1, 3), (3, 10), (1, 100)], ids=str)
    def test_cosines_at_the_scale_of_clip(self, emulator, shape):
        """As near to the truth as PyTorch's fp32, whichever classes are on top."""
        generator = torch.Generator().manual_seed(3)
        for _ in range(200):
            student, teacher = (torch.rand(2, *shape, generator=generator) * 2 - 1).unbind()
            actual = symmetric_kl(emulator, student, teacher, factors=(100.0, 100.0))
            truth = exact_symmetric_kl(student, teacher, 100.0, 100.0)
            rounded = exact_symmetric_kl(student, teacher, 100.0, 100.0, dtype=F32)
            assert_as_precise(actual[::2], rounded[::2], truth[::2])
            # It is a difference of probabilities times the scale, and they are rounded.
            assert_as_precise(actual[1:2], rounded[1:2], truth[1:2], smallest=1.0)

    def test_the_order_of_threads_changes_no_bit(self, emulator):
        student, teacher = pair(4, 1000, F32)
        results = []
        for schedule in range(4):
            emulator.use(schedule=schedule)
            results.append(symmetric_kl(emulator, student, teacher, factors=(9.0, 8.0)))
        for others in results[1:]:
            assert all(map(torch.equal, results[0], others))


class Perplexity(ctypes.Structure):
    _fields_ = [
        ("embedding_dtype", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("words", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("prompts", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("vocabulary", ctypes.c_void_p),
        ("inverse_norms", ctypes.c_void_p),
        ("temperature_factor", ctypes.c_double),
        ("temperature", ctypes.c_void_p),
        ("detach_targets", ctypes.c_bool),
        ("perplexity", ctypes.c_void_p),
        ("inverted", ctypes.c_void_p),
        ("perplexity_to_hidden", ctypes.c_void_p),
        ("inverted_to_prompts", ctypes.c_void_p),
        ("perplexity_to_prompts", ctypes.c_void_p),
        ("inverted_to_hidden", ctypes.c_void_p),
    ]


GRADIENTS = (
    "perplexity_to_hidden",
    "inverted_to_prompts",
    "perplexity_to_prompts",
    "inverted_to_hidden",
)


def perplexity(
    emulator,
    prompts,
    hidden,
    embedding,
    top_k=10,
    temperature=1.0,
    temperature_value=None,
    detach_targets=True,
    vocabulary=None,
    inverse_norms=None,
    wanted=GRADIENTS,
):
    """Every result by its name: those that are wanted, and written with detach_targets."""
    rows, width = prompts.shape
    results = {"perplexity": poisoned(rows), "inverted": poisoned(rows)}
    for name in GRADIENTS[: 2 if detach_targets else 4]:
        if name in wanted:
            results[name] = poisoned(rows, width)
    problem = Perplexity(
        embedding_dtype=DTYPES[embedding.dtype],
        rows=rows,
        words=len(embedding),
        width=width,
        top_k=top_k,
        prompts=address(prompts),
        hidden=address(hidden),
        embedding=address(embedding),
        vocabulary=address(vocabulary),
        inverse_norms=address(inverse_norms),
        temperature_factor=temperature,
        temperature=address(temperature_value),
        detach_targets=detach_targets,
        **{name: address(result) for name, result in results.items()},
    )
    size = emulator.library.perplexity_workspace(ctypes.byref(problem))
    if size == 0:
        return None
    workspace = torch.full((size,), 255, dtype=torch.uint8)
    emulator.run("perplexity", ctypes.byref(problem), ctypes.c_void_p(address(workspace)))
    return results


def exact_perplexity(prompts, hidden, embedding, detach_targets=True, **options):
    prompts, hidden = (x.double().requires_grad_() for x in (prompts, hidden))
    terms = reference.perplexity_terms(
        prompts, hidden, embedding.double(), detach_targets=detach_targets, **options
    )
    results = dict(zip(("perplexity", "inverted"), (x.detach() for x in terms), strict=True))
    for name in GRADIENTS[: 2 if detach_targets else 4]:
        term, _, leaf = name.split("_")
        (results[name],) = torch.autograd.grad(
            dict(zip(("perplexity", "inverted"), terms, strict=True))[term].sum(),
            {"prompts": prompts, "hidden": hidden}[leaf],
            retain_graph=True,
        )
    return results


def inputs(rows, words, width, dtype):
    """Words of different lengths: the logits have a deviation of about 3."""
    lengths = 1 + torch.arange(words)[:, None] % 7 * 0.1
    embedding = (normal(words, width, seed=5, scale=2.5 * width**-0.5) * lengths).to(dtype)
    prompts, hidden = (normal(rows, width, seed=seed, dtype=F32) for seed in (6, 7))
    return prompts, hidden, embedding


def assert_perplexity(emulator, prompts, hidden, embedding, **options):
    actual = perplexity(emulator, prompts, hidden, embedding, **options)
    if "temperature_value" in options:
        options["temperature"] *= options.pop("temperature_value").item()
    expected = exact_perplexity(prompts, hidden, embedding, **options)
    assert list(actual) == list(expected)
    logits = (hidden.double() @ embedding.double().T).abs().amax(1)
    for name, result in actual.items():
        # What is small because large numbers cancel has their error.
        size = expected[name].abs()
        if name == "perplexity":
            size = size.maximum(logits)
        elif "perplexity_to" in name or "to_hidden" in name:
            size = size.maximum(embedding.double().abs().max())
        error = (result - expected[name]).abs()
        while error.dim() > 1:
            error, size = error.amax(-1), size.amax(-1)
        tolerance = 1e-5 if embedding.dtype == BF16 else 4e-6
        assert (error <= tolerance * size + 1e-9).all(), f"{name}: {error} on {size}"
    return actual


class TestPerplexity:
    @pytest.mark.parametrize("detach_targets", [True, False], ids=["detached", "attached"])
    @pytest.mark.parametrize(
        ("rows", "words", "width", "top_k"),
        [
            (1, 1, 64, 1),
            (3, 2, 192, 2),
            (7, 63, 64, 10),
            (16, 997, 512, 10),
            (17, 64, 128, 64),
            (33, 997, 128, 33),
            (64, 65, 320, 1),
            (5, 130, 768, 10),
            (16, 63, 1024, 63),
        ],
    )
    @pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
    def test_accuracy(self, emulator, dtype, rows, words, width, top_k, detach_targets):
        assert_perplexity(
            emulator,
            *inputs(rows, words, width, dtype),
            top_k=top_k,
            temperature=0.05,
            detach_targets=detach_targets,
        )

    @pytest.mark.parametrize("multiprocessors", [1, 2, 3, 7, 132])
    @pytest.mark.parametrize("top_k", [1, 10, 64])
    def test_splits_of_the_vocabulary(self, emulator, multiprocessors, top_k):
        emulator.use(multiprocessors)
        assert_perplexity(emulator, *inputs(18, 3001, 64, F16), top_k=top_k)

    @pytest.mark.parametrize("shared", [232448, 166912, 101376], ids=["H100", "A100", "RTX"])
    @pytest.mark.parametrize(("width", "dtype"), [(512, BF16), (768, F16), (1024, F32)], ids=str)
    def test_devices_with_less_memory(self, emulator, shared, width, dtype):
        emulator.use(shared_per_block=shared)
        assert_perplexity(emulator, *inputs(4, 101, width, dtype), detach_targets=False)

    @pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
    def test_ties_go_to_the_smaller_index(self, emulator, dtype):
        prompts, hidden, embedding = inputs(3, 40, 64, dtype)
        embedding = embedding.repeat(8, 1)
        for top_k in (1, 5, 11, 64):
            assert_perplexity(emulator, prompts, hidden, embedding, top_k=top_k, temperature=0.1)

    def test_zero_prompts(self, emulator):
        prompts, hidden, embedding = inputs(4, 300, 64, F16)
        prompts[1] = 0
        prompts[2] = 1e-14
        vocabulary = torch.arange(300) % 7 == 3
        for mask in (None, vocabulary):
            results = assert_perplexity(
                emulator, prompts, hidden, embedding, vocabulary=mask, detach_targets=False
            )
            assert not results["inverted_to_prompts"][1:3].any()
            assert not results["perplexity_to_prompts"][1:3].any()

    def test_zero_words(self, emulator):
        prompts, hidden, embedding = inputs(4, 60, 64, F32)
        embedding[::3] = 0
        assert_perplexity(emulator, prompts, hidden, embedding, top_k=50, detach_targets=False)

    @pytest.mark.parametrize("detach_targets", [True, False], ids=["detached", "attached"])
    @pytest.mark.parametrize("counted", [1, 9, 10, 200])
    def test_vocabulary(self, emulator, counted, detach_targets):
        prompts, hidden, embedding = inputs(17, 500, 128, F16)
        vocabulary = torch.zeros(500, dtype=torch.bool)
        chosen = torch.arange(counted) * 61 % 499
        vocabulary[chosen] = True
        masked = perplexity(
            emulator,
            prompts,
            hidden,
            embedding,
            vocabulary=vocabulary,
            detach_targets=detach_targets,
        )
        words = embedding[vocabulary]
        alone = exact_perplexity(
            prompts, hidden, words, top_k=min(10, counted), detach_targets=detach_targets
        )
        for name, result in masked.items():
            size = max(alone[name].abs().max().item(), 1.0)
            assert (result - alone[name]).abs().max() <= 4e-6 * size, name

    def test_no_word_counts(self, emulator):
        vocabulary = torch.zeros(100, dtype=torch.bool)
        results = perplexity(emulator, *inputs(2, 100, 64, F16), vocabulary=vocabulary)
        for result in results.values():
            assert not result.any()

    def test_temperature_pointer(self, emulator):
        assert_perplexity(
            emulator,
            *inputs(3, 200, 64, F16),
            temperature=0.5,
            temperature_value=torch.tensor(0.125),
            detach_targets=False,
        )

    def test_inverse_norms(self, emulator):
        prompts, hidden, embedding = inputs(3, 200, 64, BF16)
        norms = reference.inverse_norm(embedding.float())
        assert_perplexity(emulator, prompts, hidden, embedding, inverse_norms=norms)
        # They are taken as given, even where they are not the norms.
        norms[:100] = 0.5
        assert_perplexity(emulator, prompts, hidden, embedding, inverse_norms=norms)

    @pytest.mark.parametrize("size", [1e-30, 1e-4, 1e4, 1e30])
    @pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
    def test_prompts_of_any_size(self, emulator, dtype, size):
        prompts, hidden, embedding = inputs(3, 200, 64, dtype)
        actual = perplexity(emulator, prompts * size, hidden, embedding)
        expected = exact_perplexity(prompts * size, hidden, embedding)
        if size < 1e-20:
            assert not actual["inverted_to_prompts"].any()
        assert_close(actual["perplexity"], expected["perplexity"], 4e-6)
        assert_close(actual["inverted"], expected["inverted"], 4e-6)

    @pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 20.0, 1e3])
    @pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
    def test_hidden_states_of_any_size(self, emulator, dtype, size):
        prompts, hidden, embedding = inputs(3, 200, 64, dtype)
        actual = perplexity(emulator, prompts, hidden * size, embedding)
        expected = exact_perplexity(prompts, hidden * size, embedding)
        tolerance = 1e-5 if dtype == BF16 else 4e-6
        for name in ("perplexity", "inverted"):
            assert_close(actual[name], expected[name], tolerance)
        # exp takes the absolute error of a logit as its relative error.
        error_of_logits = tolerance * max(size, 1.0) * 10
        name = "perplexity_to_hidden"
        assert_close(actual[name], expected[name], error_of_logits)

    @pytest.mark.parametrize("column", [0, 63])
    @pytest.mark.parametrize("side", [0, 1], ids=["prompts", "hidden"])
    @pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [F16, F32], ids=str)
    def test_bad_values_stay_in_their_row(self, emulator, dtype, value, side, column):
        sides = inputs(18, 150, 64, dtype)
        good = perplexity(emulator, *sides, detach_targets=False)
        sides[side][2, column] = value
        bad = perplexity(emulator, *sides, detach_targets=False)
        others = torch.arange(18) != 2
        for name in good:
            assert torch.equal(good[name][others], bad[name][others])
            assert bad[name][2].isnan().all()

    @pytest.mark.parametrize("counted", [True, False], ids=["counted", "excluded"])
    @pytest.mark.parametrize("word", [0, 77, 149])
    @pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
    @pytest.mark.parametrize("where", ["inverse_norms", "embedding", "norms of the embedding"])
    @pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
    def test_bad_words(self, emulator, dtype, where, value, word, counted):
        """They may be in any row's labels. Those that do not count are not in its terms."""
        prompts, hidden, embedding = inputs(18, 150, 64, dtype)
        prompts[1], hidden[2] = 0, 0
        options = dict(top_k=3, detach_targets=False, vocabulary=torch.ones(150, dtype=torch.bool))
        options["vocabulary"][word] = counted
        if where != "norms of the embedding":
            options["inverse_norms"] = reference.inverse_norm(embedding.float())
        good = perplexity(emulator, prompts, hidden, embedding, **options)
        if where == "inverse_norms":
            options["inverse_norms"][word] = value
        else:
            embedding[word, 5] = value
        bad = perplexity(emulator, prompts, hidden, embedding, **options)
        for name, result in bad.items():
            if counted:
                assert result.isnan().all(), name
            elif name != "perplexity_to_hidden" or where == "inverse_norms":
                assert torch.equal(result, good[name]), name

    @pytest.mark.parametrize("wanted", [(), GRADIENTS[:1], GRADIENTS[1:2], GRADIENTS[2:]], ids=str)
    def test_unwanted_gradients(self, emulator, wanted):
        sides = inputs(2, 70, 64, F16)
        everything = perplexity(emulator, *sides, detach_targets=False)
        some = perplexity(emulator, *sides, detach_targets=False, wanted=wanted)
        assert set(some) == {"perplexity", "inverted", *wanted}
        assert all(torch.equal(result, everything[name]) for name, result in some.items())

    def test_the_order_of_threads_changes_no_bit(self, emulator):
        sides = inputs(17, 700, 128, F16)
        results = []
        for schedule in range(6):
            emulator.use(schedule=schedule)
            results.append(perplexity(emulator, *sides, top_k=40, detach_targets=False))
        for others in results[1:]:
            assert all(torch.equal(results[0][name], others[name]) for name in others)

    @pytest.mark.parametrize(
        ("rows", "width", "options"),
        [(65, 64, {}), (1, 1088, {}), (1, 96, {}), (1, 64, {"top_k": 65})],
        ids=str,
    )
    def test_problems_that_it_does_not_serve(self, emulator, rows, width, options):
        assert perplexity(emulator, *inputs(rows, 100, width, F16), **options) is None

    def test_misaligned_or_double_embeddings_are_not_served(self, emulator):
        prompts, hidden, embedding = inputs(2, 100, 64, F16)
        assert perplexity(emulator, prompts, hidden, embedding.double()) is None
        embedding = embedding.flatten()[1:-63].view(99, 64)
        assert perplexity(emulator, prompts, hidden, embedding) is None

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
    def test_the_vocabulary_of_clip(self, emulator, dtype):
        emulator.use(132)
        assert_perplexity(emulator, *inputs(16, 49408, 512, dtype), temperature=0.05)


OUT_OF_BOUNDS = """
import pathlib, sys
from tests import cuda_emulator
from tests.ops import test_cuda_kernels as these
emulator = these.Emulator(cuda_emulator.build(pathlib.Path(sys.argv[1]), sanitize=True))
these.TestEmulator().make(emulator, "out of bounds")
"""


@pytest.mark.slow
@pytest.mark.skipif(SANITIZE in os.environ, reason="this is that run")
def test_no_access_out_of_bounds(tmp_path):
    """All tests here once more, with the address and undefined-behaviour sanitizers."""
    environment = os.environ | cuda_emulator.sanitizer_environment() | {SANITIZE: "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]

    wrong = [sys.executable, "-c", OUT_OF_BOUNDS, str(tmp_path)]
    done = subprocess.run(wrong, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
