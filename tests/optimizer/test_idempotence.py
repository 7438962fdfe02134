"""Any sequence of calls leaves the state that a plain model of it predicts."""

import copy
import io

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtlweight import Equal, MultiTaskOptimizer
from tests.problems import KEY, Counting, own, same

CALLS = ["combine", "combine nan", "backward", "step", "zero_grad", "checkpoint", "deepcopy", "report"]


def losses(w, batch):
    return {"a": (w - batch).square().sum(), "b": (w * batch).abs().sum()}


class Plain:
    """What should happen, in the plainest words: a bare optimizer, a count and two sums of losses."""

    def __init__(self):
        self.w = torch.nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))
        self.inner = torch.optim.SGD([self.w], lr=0.01, momentum=0.9)
        self.count, self.total, self.skipped = 0, {}, 0
        self.pending = None
        self.scalar = None

    def combine(self, batch, nan):
        if nan:
            self.pending, self.scalar = "skip", None
            return
        found = losses(self.w, batch)
        self.scalar = (1 + self.count) * sum(found.values())
        values = {task: float(loss.detach()) for task, loss in found.items()}
        self.pending = (self.count + 1, {task: self.total.get(task, 0.0) + x for task, x in values.items()})

    def step(self):
        if self.pending == "skip":
            self.skipped += 1
        else:
            self.inner.step()
            if self.pending is not None:
                self.count, self.total = self.pending
        self.pending = None


quietly = pytest.mark.filterwarnings("ignore:mtlweight. combine was called again before step")


# A gradient scaler that skips a step calls backward and zero_grad, and no step before the next combine.
@quietly
@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(CALLS), st.sampled_from([-2.0, 0.5, 1.0])), max_size=25))
@example([("combine", 1.0), ("combine", 0.5), ("backward", 1.0), ("combine nan", 1.0), ("step", 1.0), ("step", 1.0)])
@example([("combine", 1.0), ("backward", 1.0), ("zero_grad", 1.0), ("combine", 0.5), ("backward", 1.0), ("step", 1.0)])
@example([("combine", 1.0), ("backward", 1.0), ("checkpoint", 1.0), ("step", 1.0)])
def test_the_state_is_what_a_plain_model_of_the_calls_predicts(calls):
    plain = Plain()
    w = torch.nn.Parameter(plain.w.detach().clone())
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD([w], lr=0.01, momentum=0.9), Counting(), shared=w, on_nonfinite="skip"
    )
    scalar = None
    for call, batch in calls:
        if call in ("combine", "combine nan"):
            nan = call == "combine nan"
            scalar = optimizer.combine({task: x * (torch.nan if nan else 1) for task, x in losses(w, batch).items()})
            plain.combine(batch, nan)
        elif call == "backward" and scalar is not None:
            scalar.backward()
            if plain.scalar is not None:
                plain.scalar.backward()
            scalar = plain.scalar = None
        elif call == "step":
            optimizer.step()
            plain.step()
        elif call == "zero_grad":
            optimizer.zero_grad()
            plain.inner.zero_grad()
        elif call == "checkpoint":
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
            plain.pending = None
        elif call == "deepcopy":
            copied_w, copied = copy.deepcopy((w, optimizer))
            copied.zero_grad()
            copied.combine(losses(copied_w, batch)).backward()
            copied.step()  # has no effect here
        elif call == "report":
            _ = optimizer.report, repr(optimizer), optimizer.state_dict()

        kept, report = own(optimizer), optimizer.report
        assert (kept["step"], report.step, report.skipped) == (plain.count, plain.count, plain.skipped)
        if plain.count:
            assert float(kept["state"]["count"]) == plain.count
            found = {task: float(x) for task, x in kept["state"]["total"].items()}
            torch.testing.assert_close(found, plain.total, rtol=1e-12, atol=0.0)
        else:
            assert kept["state"] is None
            assert kept["tasks"] == []
        torch.testing.assert_close(w.detach(), plain.w.detach(), rtol=1e-12, atol=1e-12)


@quietly
@settings(max_examples=30)
@given(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=5), st.booleans())
def test_any_number_of_combines_before_a_step_changes_nothing(batches, backward):
    def trained(extra):
        w = torch.nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))
        optimizer = MultiTaskOptimizer(torch.optim.Adam([w]), Counting(), shared=w)
        for _ in range(2):
            for batch in extra:
                scalar = optimizer.combine({**losses(w, batch), **({"c": w.sum()} if batch > 2 else {})})
                if backward:
                    scalar.backward()
            optimizer.zero_grad()
            optimizer.combine(losses(w, 2.0)).backward()
            optimizer.step()
        state = optimizer.state_dict()
        state[KEY].pop("uncommitted")  # a count of exactly these
        return w.detach(), state

    assert same(trained(batches), trained([]))


def test_combine_leaves_the_state_dict_alone():
    w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = MultiTaskOptimizer(torch.optim.SGD([w], lr=0.1), Equal(), on_nonfinite="drop")
    before = optimizer.state_dict()[KEY]
    optimizer.combine({**losses(w, 1.0), "c": w.sum() * torch.nan})
    assert same(optimizer.state_dict()[KEY], before)
    assert optimizer.report.dropped == {}
