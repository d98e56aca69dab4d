"""The calls that the accelerator's device makes, recorded by stand-ins for PyTorch's streams, events and tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from finetune.memory.errors import UserError
from finetune.offload.devices import COMPLETED, Direction, choose_device
from finetune.offload.devices.accelerator import AcceleratorDevice

H2D, D2H = Direction.H2D, Direction.D2H
ODD_BYTES = 4096 * 3 + 17


class Recorder:
    def __init__(self, monkeypatch, kind: str) -> None:
        self.calls = []
        self.registered = {}
        self.register_code = 0
        recorder = self

        class Stream:
            count = 0

            def __init__(self, device, name=None):
                assert device == torch.device(kind, 0)
                self.name = name or f"copy{Stream.count}"
                Stream.count += name is None

            def wait_event(self, event):
                recorder.calls.append((self.name, "wait", event))

            def __enter__(self):
                recorder.calls.append((self.name, "enter"))

            def __exit__(self, *_):
                recorder.calls.append((self.name, "exit"))

        class FakeEvent:
            def __init__(self, device):
                assert device == torch.device(kind, 0)

            def record(self, stream):
                recorder.calls.append((stream.name, "record", self))

            def synchronize(self):
                recorder.calls.append(("host", "synchronize", self))

        class Cudart:
            def cudaHostRegister(self, address, num_bytes, flags):  # noqa: N802
                recorder.registered[address] = (num_bytes, flags)
                return recorder.register_code

            def cudaHostUnregister(self, address):  # noqa: N802
                recorder.calls.append(("host", "unregister", recorder.registered.pop(address)[0]))
                return 0

        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
        compute = Stream(torch.device(kind, 0), "compute")
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: compute)
        monkeypatch.setattr(
            torch.accelerator, "synchronize", lambda device: self.calls.append(("host", "synchronize", device))
        )
        monkeypatch.setattr(torch, "Stream", Stream)
        monkeypatch.setattr(torch, "Event", FakeEvent)
        monkeypatch.setattr(torch.cuda, "cudart", Cudart)

    def tensor(self, device: str, pinned: bool = False):
        def copy_(src, non_blocking=False):
            assert not torch.is_grad_enabled()
            self.calls.append(("copy", non_blocking))

        return SimpleNamespace(
            shape=(4,),
            dtype=torch.uint8,
            device=torch.device(device),
            is_contiguous=lambda: True,
            is_pinned=lambda: pinned,
            copy_=copy_,
        )


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
@pytest.mark.parametrize("direction, stream", [(H2D, "copy0"), (D2H, "copy1")])
@pytest.mark.parametrize("pinned", [True, False])
def test_accelerator_copy_waits_copies_and_records_on_the_stream_of_its_direction(
    monkeypatch, kind, direction, stream, pinned
):
    recorder = Recorder(monkeypatch, kind)
    device = AcceleratorDevice(kind)
    host, slot = recorder.tensor("cpu", pinned), recorder.tensor(f"{kind}:0")
    dst, src = (slot, host) if direction is H2D else (host, slot)
    before = device.record()
    event = device.copy_async(dst, src, direction, after=before)
    device.wait(event)
    device.synchronize(event)
    assert recorder.calls == [
        ("compute", "record", before),
        (stream, "wait", before),
        (stream, "enter"),
        ("copy", pinned),
        (stream, "exit"),
        (stream, "record", event),
        ("compute", "wait", event),
        ("host", "synchronize", event),
    ]
    assert before is not event


def test_accelerator_copy_without_after_waits_for_nothing(monkeypatch):
    recorder = Recorder(monkeypatch, "cuda")
    device = AcceleratorDevice("cuda")
    for after in (None, COMPLETED):
        recorder.calls.clear()
        device.copy_async(recorder.tensor("cuda:0"), recorder.tensor("cpu", True), H2D, after)
        assert [call[1] for call in recorder.calls] == ["enter", True, "exit", "record"]


@pytest.mark.parametrize(
    "direction, dst, src", [(H2D, "cpu", "cuda:0"), (D2H, "cuda:0", "cpu"), (H2D, "cuda:1", "cpu")]
)
def test_accelerator_refuses_wrong_sides(monkeypatch, direction, dst, src):
    recorder = Recorder(monkeypatch, "cuda")
    with pytest.raises(ValueError, match=f"src on {src}, dst on {dst}"):
        AcceleratorDevice("cuda").copy_async(recorder.tensor(dst), recorder.tensor(src), direction)
    assert recorder.calls == []


def test_metal_copies_are_synchronous(monkeypatch):
    recorder = Recorder(monkeypatch, "mps")
    device = AcceleratorDevice("mps")
    before = device.record()
    event = device.copy_async(recorder.tensor("mps:0"), recorder.tensor("cpu"), H2D, after=before)
    assert event.query()
    device.wait(event)
    device.synchronize(event)
    assert recorder.calls == [("compute", "record", before), ("host", "synchronize", before), ("copy", False)]
    assert not device.allocate_host_slab(100).any()


def test_cuda_host_slab_is_registered_exactly_and_unregistered_once(monkeypatch):
    recorder = Recorder(monkeypatch, "cuda")
    device = AcceleratorDevice("cuda")
    slab = device.allocate_host_slab(ODD_BYTES)
    assert slab.data_ptr() % 4096 == 0 and slab.shape == (ODD_BYTES,)
    assert recorder.registered == {slab.data_ptr(): (ODD_BYTES, 1)}
    del slab  # stays mapped while it is registered
    device.close()
    device.close()
    synchronize = ("host", "synchronize", torch.device("cuda:0"))
    assert recorder.calls == [synchronize, ("host", "unregister", ODD_BYTES), synchronize]
    assert recorder.registered == {}


def test_refused_pinning_says_what_to_do(monkeypatch):
    recorder = Recorder(monkeypatch, "cuda")
    recorder.register_code = 2
    with pytest.raises(UserError, match=f"did not pin {ODD_BYTES} bytes.*returned 2.*ulimit -l"):
        AcceleratorDevice("cuda").allocate_host_slab(ODD_BYTES)


def test_accelerator_slab_is_on_the_device_and_a_refusal_names_sizes(monkeypatch):
    recorder = Recorder(monkeypatch, "cuda")
    device = AcceleratorDevice("cuda")
    asked = []
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: asked.append((shape, options)) or "slab")
    monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda device: 12345)
    assert device.allocate_slab(1000) == "slab"
    assert asked == [((1000,), {"dtype": torch.uint8, "device": torch.device("cuda:0")})]
    assert recorder.calls == [("host", "synchronize", torch.device("cuda:0"))]
    assert device.peak_bytes() == 12345

    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 9)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SimpleNamespace(mem_get_info=lambda device: (200, 777)))
    assert device.available_bytes() == 221

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", out_of_memory)
    properties = SimpleNamespace(get_device_properties=lambda device: SimpleNamespace(total_memory=777))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: properties)
    with pytest.raises(UserError, match="cuda:0 did not grant 1000 bytes.*777 bytes in all.*--device-memory"):
        device.allocate_slab(1000)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_real_accelerator_round_trip():
    device = choose_device("auto")
    host = device.allocate_host_slab(ODD_BYTES)
    slab = device.allocate_slab(ODD_BYTES)
    data = torch.arange(ODD_BYTES).to(torch.uint8)
    host.copy_(data)
    device.wait(device.copy_async(slab, host, H2D))
    slab.add_(1)
    back = device.allocate_host_slab(ODD_BYTES)
    device.synchronize(device.copy_async(back, slab, D2H, after=device.record()))
    assert torch.equal(back, data + 1)
    assert device.peak_bytes() >= ODD_BYTES and device.total_bytes() > ODD_BYTES
    del back, host
    device.close()
