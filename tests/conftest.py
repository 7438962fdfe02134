import contextlib
import gc
import os

import hypothesis
import pytest
import torch

# No timing decides a test: neither a deadline for an example nor the health check on slow generation. The quick profile
# draws the same examples in every run, so that a change is judged by what it changed. Twice as many examples took a
# third longer, and found none of the planted faults that these miss.
hypothesis.settings.register_profile(
    "mtlweight",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
    derandomize=True,
    max_examples=50,
)
# For releases, new examples in every run: pytest --hypothesis-profile=thorough
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("mtlweight"), max_examples=2000, derandomize=False
)
hypothesis.settings.load_profile("mtlweight")

os.environ["MPLBACKEND"] = "agg"  # also for the scripts that tests start

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where the tests that ask for `device` run"
    )


def pytest_configure(config):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: expected a GPU, found none (torch.cuda.is_available() is False)")


def pytest_collection_modifyitems(config, items):
    """On another device than the CPU only the tests that ask for one run: the others would be the same again."""
    if config.getoption("--device") != "cpu":
        chosen = [item for item in items if "device" in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if "device" not in item.fixturenames])
        items[:] = chosen


@pytest.fixture(scope="session")
def device(pytestconfig):
    """Where tensors are to be: the CPU, or what ``--device`` says."""
    chosen = pytestconfig.getoption("--device")
    # cuDNN has no forward derivative, and no second one for recurrent networks; torch's own kernels have both.
    with torch.backends.cudnn.flags(enabled=False) if chosen == "cuda" else contextlib.nullcontext():
        yield chosen


def pytest_runtest_setup():
    """Random weightings follow torch's seed: each test begins with the same one, whatever ran before."""
    torch.manual_seed(0)


def pytest_collection_finish():
    """Ten thousand tests and torch's modules live to the end: the garbage collector need not look at them each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
