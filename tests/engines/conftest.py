import pytest
import torch


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA")),
    ]
)
def device(request):
    # cuDNN has no forward derivative, and no second one for recurrent networks; torch's own kernels have both.
    with torch.backends.cudnn.flags(enabled=False):
        yield request.param
