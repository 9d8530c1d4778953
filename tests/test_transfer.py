import pytest
import torch

from fastnas.transfer import staged, to_device


def test_on_the_cpu_nothing_is_copied():
    tensor = torch.arange(3)
    assert staged(tensor, torch.device("cpu")) is tensor
    assert to_device(tensor, None) is tensor
    assert to_device(tensor, torch.device("cpu")).data_ptr() == tensor.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_to_a_gpu_without_waiting():
    """Pinned blocks are not given out again before the copy has read them."""
    device = torch.device("cuda", 0)
    assert staged(torch.arange(3), device).is_pinned()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(10_000_000)
        copies = [to_device(torch.full((64,), i), device) for i in range(100)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [int(copy.sum()) for copy in copies] == [64 * i for i in range(100)]
