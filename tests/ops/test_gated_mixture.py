"""gated_mixture_loss: values, gradients, errors, and what the method promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlfast.ops import gated_mixture_loss

from . import oracles
from .support import assert_close, gradients, normal


def problem(batch=5, classes=7, heads=6, width=8, dtype=torch.float64, **changes):
    """Keyword arguments of the loss; features have norm 1, as CLIP's have."""
    texts = normal(heads, classes, width, seed=2)
    images = normal(batch, width, seed=1)
    arguments = dict(
        image_features=torch.nn.functional.normalize(images, dim=-1).to(dtype),
        gate=normal(width, heads, seed=3, dtype=dtype).requires_grad_(),
        hard_text_features=torch.nn.functional.normalize(texts, dim=-1).to(dtype),
        student_logits=normal(batch, classes, seed=4, scale=5.0, dtype=dtype).requires_grad_(),
        labels=torch.arange(batch) * 3 % classes,
        logit_scale=20.0,
    )
    return arguments | changes


def in_order(arguments, temperature=1.0, top_k=2):
    """The same problem as positional fp64 arguments of the oracle."""
    names = ("image_features", "gate", "hard_text_features", "student_logits")
    tensors = [arguments[name].detach().double() for name in names]
    tensors[1].requires_grad_()
    tensors[3].requires_grad_()
    scale = float(arguments["logit_scale"])
    return (*tensors, arguments["labels"], scale, temperature, top_k)


def compare(arguments, temperature, top_k, tolerance, gradient_tolerance):
    actual = gated_mixture_loss(**arguments, temperature=temperature, top_k=top_k, reduction="none")
    exact = in_order(arguments, temperature, top_k)
    expected = oracles.gated_mixture(*exact)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance)
    actual_gradients = gradients(actual, (arguments["gate"], arguments["student_logits"]))
    for a, e in zip(actual_gradients, gradients(expected, (exact[1], exact[3])), strict=True):
        assert_close(a, e, gradient_tolerance)
    assert actual_gradients[0].dtype == arguments["gate"].dtype
    assert actual_gradients[1].dtype == arguments["student_logits"].dtype
    return actual


class TestValuesAndGradients:
    @pytest.mark.parametrize(
        ("batch", "classes", "heads", "top_k", "temperature"),
        [
            (1, 3, 2, 2, 1.0),
            (7, 3, 12, 1, 4.0),
            (16, 1000, 12, 3, 0.5),
            (65, 10, 36, 36, 2.0),
        ],
    )
    def test_the_equation(self, batch, classes, heads, top_k, temperature):
        compare(problem(batch, classes, heads), temperature, top_k, 1e-10, 1e-9)

    def test_one_class_leaves_nothing_to_learn(self):
        arguments = problem(batch=4, classes=1)
        losses = gated_mixture_loss(**arguments, reduction="none")
        for loss in losses:
            assert (loss == 0).all()
        for gradient in gradients(losses, (arguments["gate"], arguments["student_logits"])):
            assert (gradient == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_low_precision_is_computed_in_fp32(self, dtype):
        losses = compare(
            problem(16, 100, 12, 32, dtype), 1.0, 3, 1e-5, max(1e-4, torch.finfo(dtype).eps)
        )
        assert all(loss.dtype == torch.float32 for loss in losses)

    def test_mixed_dtypes(self):
        arguments = problem(16, 100, 12, 32, torch.float32)
        for name in ("image_features", "hard_text_features"):
            arguments[name] = arguments[name].half()
        student = arguments["student_logits"].detach().bfloat16().requires_grad_()
        arguments["student_logits"] = student
        compare(arguments, 1.0, 3, 1e-5, torch.finfo(torch.bfloat16).eps)
        arguments["gate"] = arguments["gate"].detach().double().requires_grad_()
        assert gated_mixture_loss(**arguments)[0].dtype == torch.float64

    def test_reductions(self):
        arguments = problem()
        rows = gated_mixture_loss(**arguments, reduction="none")
        for row, total in zip(rows, gated_mixture_loss(**arguments, reduction="sum"), strict=True):
            assert_close(total, row.sum(), 1e-12)
        for row, mean in zip(rows, gated_mixture_loss(**arguments), strict=True):
            assert_close(mean, row.mean(), 1e-12)

    def test_scale_and_temperature_as_tensors(self):
        arguments = problem()
        plain = gated_mixture_loss(**arguments, temperature=2.0)
        arguments["logit_scale"] = torch.tensor(20.0)
        tensors = gated_mixture_loss(**arguments, temperature=torch.tensor(2.0))
        for a, e in zip(tensors, plain, strict=True):
            assert_close(a, e, 1e-12)

    def test_scale_of_a_hundred_with_offset_students(self):
        arguments = problem(16, 100, 12, 32, torch.float32, logit_scale=100.0)
        moved = arguments["student_logits"].detach() * 4 + 50
        arguments["student_logits"] = moved.requires_grad_()
        compare(arguments, 1.0, 3, 1e-5, 1e-4)

    def test_ties_in_the_gate(self):
        arguments = problem()
        arguments["gate"] = torch.zeros_like(arguments["gate"]).requires_grad_()
        compare(arguments, 1.0, 3, 1e-10, 1e-9)
        first = dict(arguments, hard_text_features=arguments["hard_text_features"][:3])
        first["gate"] = torch.zeros_like(arguments["gate"][:, :3]).requires_grad_()
        for a, e in zip(
            gated_mixture_loss(**arguments, top_k=3),
            gated_mixture_loss(**first, top_k=3),
            strict=True,
        ):
            assert_close(a, e, 1e-12)

    def test_gradcheck(self):
        arguments = problem(3, 4, 5, 4)
        inputs = arguments.pop("gate"), arguments.pop("student_logits")
        assert torch.autograd.gradcheck(
            lambda gate, student: gated_mixture_loss(
                gate=gate,
                student_logits=student,
                **arguments,
                temperature=1.5,
                top_k=3,
                reduction="none",
            ),
            inputs,
        )

    def test_two_backwards_on_one_graph(self):
        arguments = problem()
        exact = in_order(arguments)
        losses = gated_mixture_loss(**arguments, reduction="none")
        expected = oracles.gated_mixture(*exact)
        inputs = (arguments["gate"], arguments["student_logits"])
        for seed in (20, 30):
            for a, e in zip(
                gradients(losses, inputs, seed),
                gradients(expected, (exact[1], exact[3]), seed),
                strict=True,
            ):
                assert_close(a, e, 1e-9)

    def test_autocast_changes_nothing(self):
        arguments = problem(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            cast = gated_mixture_loss(**arguments)
        for a, e in zip(cast, gated_mixture_loss(**arguments), strict=True):
            assert torch.equal(a, e)

    def test_fullgraph_parity(self):
        arguments = problem(dtype=torch.float32)
        inputs = (arguments["gate"], arguments["student_logits"])
        eager = gated_mixture_loss(**arguments, reduction="none")
        compiled = torch.compile(gated_mixture_loss, fullgraph=True)(**arguments, reduction="none")
        for a, e in zip(compiled, eager, strict=True):
            assert_close(a, e, 1e-5)
        for a, e in zip(gradients(compiled, inputs), gradients(eager, inputs), strict=True):
            assert_close(a, e, 1e-4)


class TestWhatTheMethodPromises:
    def test_one_prompt_is_plain_distillation_and_leaves_the_gate_alone(self):
        arguments = problem(heads=1)
        distillation, selection = gated_mixture_loss(**arguments, temperature=2.0, top_k=1)
        teacher = 20.0 * arguments["image_features"] @ arguments["hard_text_features"][0].T
        expected = 4 * torch.nn.functional.kl_div(
            (arguments["student_logits"] / 2).log_softmax(-1),
            (teacher / 2).softmax(-1),
            reduction="batchmean",
        )
        assert_close(distillation, expected, 1e-10)
        assert_close(
            selection, torch.nn.functional.cross_entropy(teacher, arguments["labels"]), 1e-10
        )
        (gradient,) = torch.autograd.grad(distillation + selection, arguments["gate"])
        assert (gradient == 0).all()

    def test_selection_does_not_train_the_student(self):
        arguments = problem()
        _, selection = gated_mixture_loss(**arguments)
        (gradient,) = torch.autograd.grad(
            selection, arguments["student_logits"], materialize_grads=True
        )
        assert (gradient == 0).all()

    def test_prompts_not_selected_by_any_image_get_no_gradient(self):
        arguments = problem(batch=1)
        losses = gated_mixture_loss(**arguments)
        (gradient,) = torch.autograd.grad(sum(losses), arguments["gate"])
        chosen = oracles.ranked((arguments["image_features"] @ arguments["gate"])[0])[:2]
        assert gradient.any(0).nonzero()[:, 0].tolist() == sorted(chosen)

    def test_selection_prefers_the_prompt_that_is_right(self):
        arguments = problem(batch=1, classes=3, heads=2)
        texts = torch.zeros(2, 3, 8, dtype=torch.float64)
        label = int(arguments["labels"][0])
        texts[0, label] = arguments["image_features"][0]
        texts[1, (label + 1) % 3] = arguments["image_features"][0]
        arguments["hard_text_features"] = texts
        arguments["gate"] = torch.zeros(8, 2, dtype=torch.float64, requires_grad=True)
        _, selection = gated_mixture_loss(**arguments)
        (gradient,) = torch.autograd.grad(selection, arguments["gate"])
        scores = arguments["image_features"] @ -gradient
        assert scores[0, 0] > 0 > scores[0, 1]

    def test_distillation_is_zero_where_the_student_is_the_teacher(self):
        arguments = problem(heads=1)
        teacher = 20.0 * arguments["image_features"] @ arguments["hard_text_features"][0].T
        arguments["student_logits"] = teacher.clone().requires_grad_()
        distillation, _ = gated_mixture_loss(**arguments, top_k=1)
        assert float(distillation.detach()) < 1e-20

    @pytest.mark.parametrize("which", ["image_features", "student_logits"])
    def test_nan_stays_in_its_row(self, which):
        arguments = problem()
        poisoned = arguments[which].detach().clone()
        poisoned[1, 2] = torch.nan
        arguments[which] = poisoned
        student = arguments["student_logits"].detach().requires_grad_()
        arguments["student_logits"] = student
        distillation, selection = gated_mixture_loss(**arguments, reduction="none")
        assert distillation.isnan().nonzero().tolist() == [[1]]
        assert selection.isnan().nonzero().tolist() == ([[1]] if which == "image_features" else [])
        (gradient,) = torch.autograd.grad(distillation.sum(), student)
        assert gradient.isnan().any(1).nonzero().tolist() == [[1]]

    @given(
        seed=st.integers(0, 10**6),
        heads=st.integers(1, 8),
        data=st.data(),
        scale=st.floats(0.1, 100.0),
    )
    def test_properties(self, seed, heads, data, scale):
        top_k = data.draw(st.integers(1, heads))
        arguments = dict(
            image_features=normal(3, 4, seed=seed),
            hard_text_features=normal(heads, 5, 4, seed=seed + 1),
            student_logits=normal(3, 5, seed=seed + 2, scale=scale),
            labels=torch.tensor([4, 0, 2]),
            logit_scale=scale,
            top_k=top_k,
            reduction="none",
        )
        gate = normal(4, heads, seed=seed + 3)
        losses = gated_mixture_loss(gate=gate, **arguments)
        for loss in losses:
            assert (loss >= 0).all()
        arguments["student_logits"] = arguments["student_logits"] + 3.0
        moved = gated_mixture_loss(gate=gate, **arguments)
        torch.testing.assert_close(moved, losses, rtol=1e-8, atol=1e-9)
        order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed))
        arguments["hard_text_features"] = arguments["hard_text_features"][order]
        shuffled = gated_mixture_loss(gate=gate[:, order], **arguments)
        torch.testing.assert_close(shuffled, moved, rtol=1e-8, atol=1e-9)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(image_features=1.0), TypeError, r"image_features: .*\[B, d\], got float"),
            (dict(image_features=torch.zeros(5, 9)), ValueError, "gate: expected d = 9"),
            (
                dict(image_features=torch.zeros(5, 8, requires_grad=True)),
                ValueError,
                r"image_features: .*image_features.detach\(\)",
            ),
            (dict(gate=torch.zeros(8)), ValueError, r"gate: .*\[d, H\]"),
            (dict(gate=torch.zeros(8, 5)), ValueError, "hard_text_features: expected H = 5"),
            (
                dict(gate=torch.zeros(8, 6, device="meta")),
                ValueError,
                "gate: expected device cpu",
            ),
            (dict(hard_text_features=torch.zeros(6, 8)), ValueError, "hard_text_features: "),
            (dict(hard_text_features=torch.zeros(6, 0, 8)), ValueError, "hard_text_features: "),
            (
                dict(hard_text_features=torch.zeros(6, 7, 8, requires_grad=True)),
                ValueError,
                r"hard_text_features: .*hard_text_features.detach\(\)",
            ),
            (dict(student_logits=torch.zeros(5, 8)), ValueError, "student_logits: .*C = 7"),
            (dict(student_logits=torch.zeros(4, 7)), ValueError, "student_logits: .*B = 5"),
            (dict(labels=torch.zeros(5)), TypeError, r"labels: .*torch.int64 \[B\]"),
            (dict(labels=torch.zeros(5, dtype=torch.int32)), TypeError, "labels: "),
            (dict(labels=torch.zeros(4, dtype=torch.int64)), ValueError, "labels: .*B = 5"),
            (dict(logit_scale=0.0), ValueError, "logit_scale: "),
            (dict(logit_scale=None), TypeError, "logit_scale: "),
            (
                dict(logit_scale=torch.tensor(1.0, requires_grad=True)),
                ValueError,
                r"logit_scale: .*logit_scale.detach\(\)",
            ),
            (dict(temperature=-1.0), ValueError, "temperature: "),
            (dict(top_k=7), ValueError, "top_k: .*1 to 6"),
            (dict(top_k=0), ValueError, "top_k: .*1 to 6"),
            (dict(reduction="batchmean"), ValueError, "reduction: "),
        ],
    )
    def test_each_names_its_argument(self, change, error, message):
        with pytest.raises(error, match=f"^{message}"):
            gated_mixture_loss(**problem(**change))

    def test_an_empty_batch(self):
        with pytest.raises(ValueError, match="image_features: expected at least one element"):
            gated_mixture_loss(**problem(batch=0))

    def test_labels_are_read_on_request(self, monkeypatch):
        monkeypatch.setenv("VLFAST_CHECK", "1")
        with pytest.raises(ValueError, match="labels: expected values from 0 to 6, got 7 to 7"):
            gated_mixture_loss(**problem(labels=torch.full((5,), 7)))

    def test_the_scale_is_not_optional(self):
        arguments = problem()
        del arguments["logit_scale"]
        with pytest.raises(TypeError, match="logit_scale"):
            gated_mixture_loss(**arguments)
