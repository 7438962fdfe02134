import gc
import os

import hypothesis
import torch

# No timing decides a test: neither a deadline for an example nor the health check on slow generation. The quick profile
# draws the same examples in every run, so that a change is judged by what it changed.
hypothesis.settings.register_profile(
    "mtlweight",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
    derandomize=True,
)
# For releases, new examples in every run: pytest --hypothesis-profile=thorough
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("mtlweight"), max_examples=2000, derandomize=False
)
hypothesis.settings.load_profile("mtlweight")

os.environ["MPLBACKEND"] = "agg"  # also for the scripts that tests start

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_runtest_setup():
    """Random weightings follow torch's seed: each test begins with the same one, whatever ran before."""
    torch.manual_seed(0)


def pytest_collection_finish():
    """Ten thousand tests and torch's modules live to the end: the garbage collector need not look at them each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
