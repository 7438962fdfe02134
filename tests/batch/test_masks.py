"""A sample without a label for a task is no part of that task."""

import pytest
import torch

from mtlweight import (
    FAMO,
    L2RW,
    MGDA,
    UW,
    Constant,
    Equal,
    GradDrop,
    MTLWeightError,
    Needs,
    NonFiniteError,
    PCGrad,
    SLGrad,
    every,
    weighting,
)
from tests.problems import Problem, own, poison, same, same_numbers, step, wrap

MASK = {"left": torch.tensor([1, 1, 0, 1, 0, 1]).bool(), "right": torch.tensor([0, 1, 0, 0, 0, 1]).bool()}


def without_labels(p, k=0):
    """Losses per sample, with labels that mean nothing where there are none."""
    x, y = p.batch(k)
    outputs = p.model(x)
    return {task: (outputs[task] - y[task].where(MASK[task], 1e3)).square() for task in p.tasks}


def of_the_labelled(p, k=0):
    return {task: loss[MASK[task]].mean() for task, loss in p.samples(k).items()}


@pytest.mark.parametrize("engine", ["auto", "rows", "batched", "samples", "features"])
@pytest.mark.parametrize("by", [Equal(), UW(step_size=0.5), MGDA(), UW() >> PCGrad(), every(2, PCGrad())], ids=repr)
def test_tasks_count_by_the_means_over_the_labelled_samples(by, engine):
    p, q = Problem(), Problem()
    optimizer, other = (wrap(each, by, shared=each.encoder, engine=engine) for each in (p, q))
    for k in range(3):
        step(optimizer, lambda k=k: without_labels(p, k), mask=MASK)
        step(other, lambda k=k: of_the_labelled(q, k))
        same_numbers(p.parameters(), q.parameters(), rtol=1e-9)
        assert optimizer.report.task_losses == pytest.approx(other.report.task_losses)
        assert optimizer.report.task_weights == pytest.approx(other.report.task_weights)


@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
def test_so_they_do_for_weights_per_entry(heads):
    p, q = Problem(), Problem()
    optimizer, other = (wrap(each, GradDrop(), shared=each.encoder, heads=heads) for each in (p, q))
    step(optimizer, lambda: without_labels(p), mask=MASK)
    step(other, lambda: of_the_labelled(q))
    same_numbers(p.parameters(), q.parameters(), rtol=1e-9)


SAMPLE_LEVEL = [
    SLGrad("left"),
    SLGrad("left", normalize="task"),
    SLGrad("left", temperature=0.5),
    SLGrad("left", temperature=0.5, normalize="task"),
    SLGrad("left", lookahead=True),
    L2RW(),
]


@pytest.mark.parametrize("engine", ["auto", "pullback", "samples", "rows"])
@pytest.mark.parametrize("by", SAMPLE_LEVEL, ids=repr)
def test_weights_per_sample_are_zero_without_a_label_and_else_as_if_the_others_were_not_there(by, engine):
    p = Problem()
    optimizer = wrap(p, by, shared=p.encoder, model=p.model, engine=engine)
    reference = p.reference
    step(optimizer, lambda: without_labels(p), reference=reference, mask=MASK)
    weights, alignment = optimizer.report.weights, optimizer.report.alignment
    labelled = torch.stack([MASK[task] for task in p.tasks])
    assert not weights[~labelled].any()
    assert not alignment[~labelled].any()
    if getattr(by, "normalize", "task") == "all":
        same_numbers(weights[labelled], by(alignment=alignment[labelled][None])[0], rtol=1e-9)
    else:
        for row, each, mask in zip(weights, alignment, labelled, strict=True):
            same_numbers(row[mask], by(alignment=each[mask][None])[0], rtol=1e-9)


@weighting(Needs.ALIGNMENT | Needs.SAMPLES, writes="sample")
def everywhere(view):
    return torch.ones_like(view.sample_alignment)


def test_a_weighting_need_not_know_of_masks():
    p = Problem()
    optimizer = wrap(p, everywhere >> Constant(2.0), shared=p.encoder)
    step(optimizer, lambda: without_labels(p), reference=p.reference, mask=MASK)
    labelled = torch.stack([MASK[task] for task in p.tasks])
    assert torch.equal(optimizer.report.weights, 2.0 * labelled)


def test_between_renewals_a_tasks_total_is_spread_over_its_labelled_samples():
    p = Problem()
    optimizer = wrap(p, every(2, SLGrad("left")), shared=p.encoder)
    step(optimizer, p.samples, reference=p.reference)
    totals = optimizer.report.weights.sum(dim=1, keepdim=True)
    step(optimizer, lambda: without_labels(p), mask=MASK)
    labelled = torch.stack([MASK[task] for task in p.tasks])
    same_numbers(optimizer.report.weights, totals * labelled / labelled.sum(dim=1, keepdim=True))


def test_a_task_without_any_label_is_absent_and_keeps_its_state():
    p = Problem()
    optimizer = wrap(p, UW(step_size=0.5))
    step(optimizer, p.samples)
    before = own(optimizer)["state"]["log_variance"]["right"].clone()
    step(optimizer, lambda: p.samples(1), mask={"right": torch.zeros(6, dtype=torch.bool)})
    assert optimizer.report.tasks == ("left",)
    assert torch.equal(own(optimizer)["state"]["log_variance"]["right"], before)


def test_a_batch_without_any_label_is_skipped():
    p = Problem()
    optimizer = wrap(p, UW())
    step(optimizer, p.samples, mask={task: torch.zeros(6, dtype=torch.bool) for task in p.tasks})
    assert (optimizer.report.skipped, optimizer.report.step) == (1, 0)


UNDER_THE_MASK = {
    # what the loss of a sample without a label is, and what the message says of it
    "a NaN for its label": (lambda loss: loss * torch.nan, "The loss of a sample without a label is NaN or infinite"),
    "a loss with a gradient of NaN": (lambda loss: (loss * 0).sqrt(), "It may be that of one without a label"),
}


@pytest.mark.parametrize(
    ("by", "form"),
    [
        pytest.param(by, form, id=f"{by!r}-{form}")
        for by in (Equal(), UW(), MGDA(), GradDrop(), SLGrad("left"))
        for form in ("callable", "computed", "parts")
        if form != "parts" or by.writes != "entry"  # which takes the batch at once
    ],
)
@pytest.mark.parametrize("kind", UNDER_THE_MASK)
def test_a_bad_gradient_under_the_mask_is_named_with_its_task_and_what_to_do(kind, by, form):
    make, says = UNDER_THE_MASK[kind]
    mask = {"left": torch.ones(6).bool(), "right": MASK["right"]}

    def losses():
        found = p.samples()
        return {**found, "right": torch.where(mask["right"], found["right"], make(found["right"]))}

    p = Problem()
    optimizer = wrap(p, by, shared=p.encoder, model=p.model)
    before = p.everything(optimizer)
    given = {"callable": losses, "parts": [losses, losses]}.get(form) or losses()

    def act():
        optimizer.combine(given, reference=p.reference, mask=[mask, mask] if form == "parts" else mask).backward()
        optimizer.step()

    with pytest.raises(NonFiniteError, match=rf"{says} \(task right\): .*0 \* NaN is NaN.* any finite label") as caught:
        act()
    assert "task left" not in str(caught.value)
    p.model.zero_grad()
    assert same(p.everything(optimizer), before)


def test_a_bad_gradient_of_a_labelled_sample_is_not_said_to_be_under_the_mask():
    p = Problem()
    optimizer = wrap(p, Equal())
    losses = p.samples()
    losses["left"] = losses["left"] + poison(p.encoder[0].weight)
    optimizer.combine(losses, mask={"left": torch.ones(6).bool()}).backward()
    with pytest.raises(NonFiniteError, match=r"The step was not taken\. Look at the batch"):
        optimizer.step()


def test_a_tensor_of_losses_takes_a_tensor_of_masks():
    p, q = Problem(), Problem()
    optimizer, other = wrap(p, UW()), wrap(q, UW())
    step(optimizer, torch.stack([*without_labels(p).values()]), mask=torch.stack([*MASK.values()]))
    step(other, without_labels(q), mask=MASK)
    assert all(a.equal(b) for a, b in zip(p.parameters().values(), q.parameters().values(), strict=True))


def test_what_is_observed_after_the_step_is_over_the_labelled_samples_too():
    p, q = Problem(), Problem()
    optimizer, other = wrap(p, FAMO()), wrap(q, FAMO())
    for k in range(3):
        step(optimizer, lambda k=k: without_labels(p, k), mask=MASK)
        step(other, lambda k=k: of_the_labelled(q, k))
    same_numbers(own(optimizer)["state"], own(other)["state"], rtol=1e-9)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True], r"mask as a mapping from task name to booleans \[b\], or booleans \[m, b\]; found list\. Pass"),
        ({"left": torch.ones(6)}, r"mask of task 'left' as a tensor of booleans.* found torch.float32\. Convert"),
        ({"left": [True] * 6}, r"mask of task 'left' as a tensor of booleans.* found list\. Convert"),
        ({"left": torch.ones(5).bool()}, r"of the shape of its loss \[6\]; found \[5\]\. Give losses per sample"),
        (
            {"up": torch.ones(6).bool()},
            r"masks of tasks that have losses \(left, right\), found one of 'up'\. Rename or drop it",
        ),
    ],
)
def test_masks_of_another_form_say_what_is_expected(mask, message):
    p = Problem()
    with pytest.raises(MTLWeightError, match=message):
        wrap(p, UW()).combine(p.samples(), mask=mask)
