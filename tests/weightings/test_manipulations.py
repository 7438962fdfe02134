"""AlignedMTL, GradVac, Krum, PCD, CRMOGM and DBMTL: what they say they do, and what they refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtlweight import CRMOGM, DBMTL, PCD, AlignedMTL, GradDrop, GradVac, Krum, MTLWeightError, PCGrad, SLGrad
from tests.weightings._run import run_rows

seeds = st.integers(0, 2**32 - 1)


def rows(m, seed, n=8):
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 6), seeds)
def test_aligned_gradients_are_orthogonal_and_as_long_as_the_least_singular_value(m, seed):
    J = rows(m, seed)
    sigma = torch.linalg.svdvals(J)[-1]
    d = AlignedMTL()(jacobian=J) @ J
    torch.testing.assert_close(d.norm(), sigma / m**0.5, rtol=1e-8, atol=0.0)


def test_gradvac_brings_a_cosine_to_its_target():
    agree, disagree = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    agree[1] = torch.tensor([0.8, 0.6])
    (_, weights), states = run_rows(GradVac(0.5), [agree, disagree])
    assert states[0]["target"]["0"].tolist() == pytest.approx([0.0, 0.4])
    turned = torch.tensor([1.0, float(weights[1]) - 1.0])  # g_0 and what it took of g_1
    assert float(turned[1] / turned.norm()) == pytest.approx(0.4)


def test_gradvac_keeps_its_targets_by_name_while_tasks_come_and_go():
    J = rows(3, 0)
    names = [("a", "b"), ("b", "c", "a"), ("c", "b")]
    _, states = run_rows(GradVac(0.5), [J[:2], J, J[1:]], tasks=names)
    assert {task: int(place) for task, place in states[2]["place"].items()} == {"a": 0, "b": 1, "c": 2}
    assert torch.equal(states[2]["target"]["a"], states[1]["target"]["a"])
    assert states[2]["target"]["b"][0] == states[1]["target"]["b"][0]
    assert states[2]["target"]["b"][2] != states[1]["target"]["b"][2]


@given(st.integers(2, 6), seeds, st.floats(0, 1))
def test_pcd_gives_every_task_its_share_of_progress_at_the_main_gradients_length(m, seed, progress):
    J = rows(m, seed)
    d = PCD("0", progress)(jacobian=J) @ J
    torch.testing.assert_close(d.norm(), J[0].norm(), rtol=1e-8, atol=0.0)
    unit = J / J.norm(dim=1, keepdim=True)
    assert (unit[1:] @ d >= -1e-8).all()


def test_pcd_drops_constraints_that_exclude_each_other():
    J = torch.tensor([[1.0, 1.0], [1.0, 0.0], [-2.0, 0.0]])
    assert PCD("0")(jacobian=J).tolist() == [1.0, 0.0, 0.0]


def test_pcd_asks_for_the_main_task_and_rests_without_it():
    with pytest.raises(MTLWeightError, match=r"main task 'x' among the tasks, found 0, 1"):
        PCD("x")(gramian=torch.eye(2))
    history, _ = run_rows(PCD("a"), [rows(2, 0), rows(1, 1)], tasks=[("a", "b"), ("b",)])
    assert history[1].tolist() == [0.0]


def test_krum_asks_for_enough_tasks():
    with pytest.raises(MTLWeightError, match=r"at least 5 tasks .* found 4"):
        Krum(1)(gramian=torch.eye(4))
    with pytest.raises(MTLWeightError, match=r"at least 3 tasks .* found 2"):
        Krum(selected=3)(gramian=torch.eye(2))


@given(st.integers(1, 5), seeds)
def test_dbmtl_makes_all_gradients_of_logarithms_as_long_as_the_longest(m, seed):
    J, losses = rows(m, seed), rows(1, seed, m)[0].abs() + 0.1
    h = J / losses[:, None]
    expected = (h / h.norm(dim=1, keepdim=True)).sum(dim=0) * h.norm(dim=1).max()
    d = (DBMTL(tracking=0.0)(losses=losses, jacobian=J) * J).sum(dim=0)
    torch.testing.assert_close(d, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AlignedMTL("max"),
        lambda: GradVac(0.0),
        lambda: Krum(-1),
        lambda: Krum(selected=0),
        lambda: PCD(progress=1.5),
        lambda: PCD(decay=1.0),
        lambda: PCD(epsilon=-1.0),
        lambda: CRMOGM(decay=1.0),
        lambda: CRMOGM(GradDrop()),
        lambda: CRMOGM(SLGrad("0")),
        lambda: DBMTL(1.0),
        lambda: DBMTL(fading=-1.0),
        lambda: DBMTL()(losses=-torch.ones(1), jacobian=torch.ones(1, 1)),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(MTLWeightError, match="expected"):
        make()


def test_crmogm_averages_from_the_first_weights_on():
    J = [rows(2, seed) for seed in range(3)]
    inner = [PCGrad()(jacobian=j) for j in J]
    found, _ = run_rows(CRMOGM(PCGrad(), decay=0.5), J)
    torch.testing.assert_close(found[2], inner[0] / 4 + inner[1] / 4 + inner[2] / 2)
