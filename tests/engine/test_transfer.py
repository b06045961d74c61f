"""Scalars on their way to the host, tensors on their way to the device."""

import pytest
import torch
from vidtta.engine.transfer import on_its_way, send

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_are_those_of_when_they_were_asked_for(device):
    loss, norm = (
        torch.tensor(0.1, device=device),
        torch.tensor(3.0, dtype=torch.bfloat16, device=device, requires_grad=True),
    )
    read = on_its_way([loss, norm])
    loss.fill_(7.0)
    assert read() == [torch.tensor(0.1).item(), 3.0]
    assert read() == [torch.tensor(0.1).item(), 3.0]


@pytest.mark.parametrize("device", DEVICES)
def test_a_tensor_arrives_whole(device):
    tensor = torch.arange(60.0).view(3, 4, 5).transpose(0, 2)
    there = send(tensor, torch.device(device), torch.float16)
    assert there.device.type == device and torch.equal(there.cpu(), tensor.half())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_neither_waits_for_the_device():
    one = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    read = on_its_way([one])
    torch.cuda._sleep(2_000_000_000)  # about a second
    there = send(torch.ones(1000), torch.device("cuda"), torch.float32)
    end = torch.cuda.Event()
    end.record()
    assert read() == [1.0]
    assert not end.query()
    torch.cuda.synchronize()
    assert there.sum() == 1000
