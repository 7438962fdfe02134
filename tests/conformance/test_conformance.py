"""Every shipped weighting, under every check that its needs and traits call for."""

import inspect

import pytest
import torch

import mtlweight
from mtlweight import View
from mtlweight._checkpoint import signature
from mtlweight._statistics import Given
from mtlweight._weighting import evaluate
from mtlweight.testing import parametrize_with_checks
from tests.registry import CASES


@parametrize_with_checks(CASES)
def test_the_shipped_weighting_passes(weighting, check):
    check(weighting)


def parts_of(weighting):
    yield weighting
    for part in getattr(weighting, "parts", ()):
        yield from parts_of(part)


SHIPPED = [
    value
    for name in sorted(mtlweight.__all__)
    if inspect.isclass(value := getattr(mtlweight, name)) and issubclass(value, mtlweight.Weighting)
    if not inspect.isabstract(value)
]
# All that needs no reference objective. ConicGrad is not among them: docs/methods/gramian.md says why.
CATALOGUE = (  # noqa: SIM905  # forty lines of one word each say no more
    "Equal Constant RLW UW DWA GLS SI IMTLL STCH FAMO SoftAdapt ReLoBRaLo CoV SLAW COSMOS PBI MGDA PCGrad GradVac "
    "CAGrad NashMTL IMTLG GradNorm AlignedMTL UPGrad DualProj FairGrad ConFIG SDMGrad CRMOGM MoDo DBMTL Krum PCD "
    "GradDrop TrimmedMean MoCo ExcessMTL"
).split()
COMBINATORS = sorted(set(mtlweight.compose.__all__) - {"chain", "weighting"})


@pytest.mark.parametrize("kind", SHIPPED, ids=lambda kind: kind.__name__)
def test_every_exported_weighting_has_a_row_of_its_own_with_an_oracle(kind):
    rows = [case for case in CASES if type(case.weighting) is kind]
    assert rows, f"tests/registry.py has no row for {kind.__name__}"
    assert any(case.oracle for case in rows), f"no row of {kind.__name__} in tests/registry.py has an oracle"


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_method_of_the_catalogue_is_made_without_arguments(name):
    assert isinstance(getattr(mtlweight, name)(), mtlweight.Weighting)


@pytest.mark.parametrize("name", COMBINATORS)
def test_every_combinator_has_a_row(name):
    assert any(repr(case.weighting).startswith(f"{name}(") for case in CASES)


def shapes(state, path=()):
    """The tensors' shapes by their path, and that of each table as well."""
    if isinstance(state, torch.Tensor):
        return {path: tuple(state.shape)}
    found = {path: "table"} if len(path) == 1 else {}
    for key, value in state.items():
        found |= shapes(value, (*path, key))
    return found


def test_weightings_whose_checkpoints_load_into_each_other_have_states_of_one_layout():
    random = torch.Generator().manual_seed(0)
    losses, alignment = torch.rand(2, 4, generator=random) + 0.5, torch.randn(2, 4, generator=random)
    given = Given(losses=losses, jacobian=torch.randn(2, 4, 3, generator=random), alignment=alignment)
    known = {}
    for case in CASES:
        if 2 in case.tasks:
            state = None
            for step in range(4):
                _, state = evaluate(case.weighting, View(given, step=step), state)
            found, like = shapes(state), known.setdefault(signature(case.weighting), shapes(state))
            # A table may lack a task's row, which `gather` fills in.
            assert {k for k in found if len(k) == 1} == {k for k in like if len(k) == 1}, case.weighting
            assert all(found[k] == like[k] for k in found.keys() & like.keys()), case.weighting
