"""Memory of lanes that wait: on disk, but for the lanes that run.

[Note: waiting lanes]
Between two visits a lane holds what it will go on with: the block's output, which is the next block's input; tables and masks
that all blocks are given; what it has embedded; after the last block the final hidden states, and what the norm before the head
keeps for backward. With many micro-batches a step this grows without bound. So when a lane parks, and when it is through, the
storages that its code has made, and those that visits gave it, are written to the scratch file and emptied. The tensors stay:
graphs and frames of the model's code refer to them. A storage is filled again when an operation asks for it, which a dispatch
mode sees; what graphs have saved is asked for by hooks. The bytes on disk are the block's input that backward needs, too: they
are written once. Gradients on their way to a block wait there as well.

What lives longer than a lane is left alone: tensors that the model's modules have as attributes, inputs of the step, and
everything that is no floating-point number or bool (token ids, labels, states of generators).
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from finetune.memory.slots import SlotPool
from finetune.offload.residency.io import IOEngine
from finetune.offload.residency.pieces import State
from finetune.offload.step import activations
from finetune.offload.step.activations import SavedTensor, SpillingActivations

KEPT_FREE = 2  # slots that nothing is read ahead into: one is written from, one is filled


_PLAIN = (torch.Tensor, bool, int, float, str, torch.dtype, torch.device)


class LaneActivations(SpillingActivations):
    """Bytes on disk that are asked for again and again, roughly in the order in which they are announced.

    What is read ahead lies in slots, of which `KEPT_FREE` are left to what is written meanwhile. `pool` has more than these.
    """

    def __init__(self, io: IOEngine, pool: SlotPool, device: torch.device, directory: Path) -> None:
        super().__init__(io, pool, 0, device, directory)
        self._ahead: set[Any] = set()
        """Pieces that are in a slot, or on their way there, before they are asked for."""

    @property
    def slot_bytes(self) -> int:
        return self._pool.slot_bytes

    def save(self, tensor: torch.Tensor) -> SavedTensor:
        """As it is, in memory: what is to go to disk is given to `keep`."""
        return SavedTensor(self, tensor.detach())

    def keep(self, data: torch.Tensor) -> SavedTensor:
        """Bytes, uint8 [at most slot_bytes], which are the caller's again when this returns; their only user is the caller."""
        saved = SavedTensor(self, data)
        saved.users = 1
        self._held_bytes += saved.num_bytes
        self._spill(saved)
        return saved

    def load(self, saved: SavedTensor, into: torch.Tensor) -> None:
        """Fills `into` with the bytes that `keep` was given."""
        piece = saved._spilled
        if piece.state in (State.AWAY, State.WRITING):
            self._start_read(piece)
        if piece.state is State.FETCHING:
            self.stall_seconds += piece.arrive()
        piece.acquire()
        into.copy_(piece.buffer[: saved.num_bytes])
        piece.release()
        piece.leave()
        self._ahead.discard(piece)
        self._read_ahead()

    def expect(self, saved: SavedTensor) -> None:
        """Will be asked for after what was announced before."""
        self._to_read.append(saved)
        self._read_ahead()

    def _read_ahead(self) -> None:
        while self._to_read and len(self._ahead) < self._pool.count - KEPT_FREE:
            while self._written and self._written[0].settled:
                self._finish(self._written.popleft())
            piece = self._to_read[0]._spilled
            if piece is not None and piece.state is State.WRITING and not piece.settled:
                return  # it is in memory, and its slot is not to be waited for
            if piece is not None and piece.state in (State.AWAY, State.WRITING):
                if piece.state is State.AWAY and self._pool.free_count == 0:
                    return
                self._start_read(piece)
                self._ahead.add(piece)
            self._to_read.popleft()

    def _free(self, saved: SavedTensor) -> None:
        self._ahead.discard(saved._spilled)
        super()._free(saved)

    def begin_backward(self, order: Iterable[SavedTensor]) -> None:
        """What is on disk was announced already."""

    def begin_step(self) -> None:
        """Whatever a step that failed has announced is not wanted any more."""
        self._to_read.clear()
        for piece in self._ahead:
            piece.settle()
            piece.leave()
        self._ahead.clear()


class Bytes:
    """Of a storage, on disk, in pieces of a slot each. `users` as those of a `SavedTensor`."""

    __slots__ = ("users", "num_bytes", "_parts", "_store")

    def __init__(self, store: LaneActivations, data: torch.Tensor) -> None:
        """data: uint8 [any], whole."""
        self.users = 1
        self.num_bytes = data.numel()
        self._store = store
        self._parts = [store.keep(part) for part in data.split(store.slot_bytes)]

    def expect(self) -> None:
        for part in self._parts:
            self._store.expect(part)

    def load(self, into: torch.Tensor) -> None:
        """into: uint8, of as many bytes."""
        for part, target in zip(self._parts, into.split(self._store.slot_bytes), strict=True):
            self._store.load(part, target)

    def release(self) -> None:
        self.users -= 1
        if self.users == 0:
            for part in self._parts:
                part.release()


class StoredTensor:
    """A tensor whose storage's bytes are on disk. Stands in a record where a `SavedTensor` would."""

    __slots__ = ("users", "_data", "_like")

    def __init__(self, data: Bytes, like: torch.Tensor, offset: int) -> None:
        """Becomes a user of `data`. like: has its dtype, device and layout. offset: in the storage, in numbers."""
        data.users += 1
        self.users = 1
        self._data = data
        self._like = like.dtype, like.device, offset, like.shape, like.stride()

    def expect(self) -> None:
        self._data.expect()

    def restore(self) -> torch.Tensor:
        """In memory of its own."""
        dtype, device, *place = self._like
        with _disable_current_modes():
            storage = torch.UntypedStorage(self._data.num_bytes, device=device)
            self._data.load(_bytes_of(storage))
            return torch.empty(0, dtype=dtype, device=device).set_(storage, *place)

    def release(self) -> None:
        self.users -= 1
        if self.users == 0:
            self._data.release()


class _Storage:
    """One that a lane made or was given."""

    __slots__ = ("lane", "num_bytes", "reference", "data", "is_near")

    def __init__(self, lane: int, storage: torch.UntypedStorage, reference: weakref.ref) -> None:
        self.lane = lane
        self.num_bytes = storage.nbytes()
        self.reference = reference
        self.data: Bytes | None = None  # None: what is on disk, if anything, is not what it holds
        self.is_near = True


class LaneStorages:
    """See [Note: waiting lanes]. most_near: lanes whose storages may be filled at once outside of visits, as the loss fills
    them."""

    def __init__(self, store: LaneActivations, holders: Sequence[Any], most_near: int) -> None:
        """holders: objects with attributes that live longer than a lane: the model's modules outside of blocks."""
        self.store = store
        self.most_near = most_near
        self._holders = holders
        self._known: dict[int, _Storage] = {}
        self._by_lane: dict[int, dict[int, _Storage]] = {}
        self._kept: set[int] = set()
        self._gone: list[Bytes] = []
        self._near: deque[int] = deque()
        self._made_any = False
        self.begin_lane: Callable[[int], None] = lambda lane: None

    def begin_step(self, inputs: Iterable[Any], begin_lane: Callable[[int], None]) -> None:
        """inputs: of all lanes; their tensors are the caller's. begin_lane: to be called with the number of a lane before its
        model runs."""
        self.begin_lane = begin_lane
        self._release_gone()
        left = list(self._known.values())
        self._known, self._by_lane, self._near = {}, {}, deque()
        for stored in left:
            if stored.data is not None:
                stored.data.release()
                stored.data = None
        self.store.begin_step()
        self._kept = {_key(x) for x in tree_leaves(list(inputs)) if isinstance(x, torch.Tensor)}

    @contextlib.contextmanager
    def running(self, lane: int) -> Iterator[None]:
        """Code of the lane runs inside."""
        with saved_tensors_hooks(_pack, self._unpack), _Guard(self, lane):
            yield

    def guarded(self) -> contextlib.AbstractContextManager:
        """Inside, tensors of lanes can be used; those of the last `most_near` lanes stay filled."""
        return _Guard(self, None)

    @contextlib.contextmanager
    def visit(self, lane: int, arguments: Any) -> Iterator[None]:
        """A block runs inside, with these arguments of the lane."""
        given = _tensors(arguments)
        self.bring(given, lane)
        versions = [tensor._version for tensor in given]
        with self.for_visit(arguments):
            yield
        self.changed(tensor for tensor, version in zip(given, versions, strict=True) if tensor._version != version)

    def for_visit(self, arguments: Any) -> contextlib.AbstractContextManager:
        """What a block runs in, for it may look into objects among its arguments, such as key-value caches."""
        plain = all(leaf is None or isinstance(leaf, _PLAIN) for leaf in tree_leaves(arguments))
        return contextlib.nullcontext() if plain else self.guarded()

    def note(self, made: Any, lane: int) -> None:
        """What tensors in `made` lie in is the lane's."""
        for tensor in _tensors(made):
            self._note(tensor, lane)

    def _note(self, tensor: torch.Tensor, lane: int) -> None:
        if not (tensor.is_floating_point() or tensor.dtype is torch.bool) or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._kept or storage.nbytes() < activations.SPILL_MIN_BYTES:
            return
        if not storage.resizable():
            return
        stored = _Storage(lane, storage, weakref.ref(storage, lambda _: self._forget(key, stored)))
        self._known[key] = self._by_lane.setdefault(lane, {})[key] = stored
        self._made_any = True

    def bring(self, tensors: Iterable[torch.Tensor], lane: int | None = None) -> None:
        """Fills what `tensors` lie in. lane: that runs, or whose visit begins; None: the loss, or anybody."""
        wanted = [one for one in (self._known.get(_key(tensor)) for tensor in tensors) if one is not None]
        for stored in wanted:
            if not stored.is_near and (storage := stored.reference()) is not None:
                with _disable_current_modes():  # hooks come here while a guard is in place
                    storage.resize_(stored.num_bytes)
                    stored.data.load(_bytes_of(storage))
                stored.is_near = True
        if lane is None and wanted:
            needed = {stored.lane for stored in wanted}
            for index in needed:
                if index not in self._near:
                    self._near.append(index)
            while len(self._near) > max(self.most_near, len(needed)):
                first = next(index for index in self._near if index not in needed)
                self._near.remove(first)
                self.put_away(first)

    def changed(self, tensors: Iterable[torch.Tensor]) -> None:
        """Were written into: the bytes on disk are older."""
        for tensor in tensors:
            stored = self._known.get(_key(tensor))
            if stored is not None and stored.data is not None:
                stored.data.release()
                stored.data = None

    def put_away(self, lane: int, next_call: Any = ()) -> None:
        """Empties the lane's storages. next_call: arguments of the block that it waits for, which are wanted first."""
        self._release_gone()
        if self._made_any:
            self._made_any = False
            self._leave_alone_what_stays()
        for stored in list(self._by_lane.get(lane, {}).values()):
            storage = stored.reference() if stored.is_near else None
            if storage is None:
                continue
            self._write(stored, storage)
            storage.resize_(0)
            stored.is_near = False
        for tensor in _tensors(next_call):
            if (stored := self._known.get(_key(tensor))) is not None and stored.data is not None:
                stored.data.expect()

    def stored(self, tensor: torch.Tensor) -> StoredTensor | None:
        """`tensor`, which is filled, for backward; None: it does not go to disk."""
        stored = self._known.get(_key(tensor))
        if stored is None:
            return None
        self._write(stored, tensor.untyped_storage())
        return StoredTensor(stored.data, tensor, tensor.storage_offset())

    def set_aside(self, gradient: torch.Tensor) -> torch.Tensor | StoredTensor:
        """`gradient` on disk; itself where that is not worth it."""
        self._release_gone()
        if gradient.nbytes < activations.SPILL_MIN_BYTES or not gradient.is_contiguous():
            return gradient
        with _disable_current_modes():
            data = Bytes(self.store, gradient.detach().reshape(-1).view(torch.uint8))
        found = StoredTensor(data, gradient, 0)
        data.release()  # its user is `found`
        return found

    def _write(self, stored: _Storage, storage: torch.UntypedStorage) -> None:
        if stored.data is None:
            with _disable_current_modes():
                stored.data = Bytes(self.store, _bytes_of(storage))

    def _forget(self, key: int, stored: _Storage) -> None:
        """Called when a storage dies, wherever that happens: nothing is waited for here."""
        if self._known.get(key) is stored:
            del self._known[key], self._by_lane[stored.lane][key]
        if stored.data is not None:
            self._gone.append(stored.data)
            stored.data = None

    def _release_gone(self) -> None:
        while self._gone:
            self._gone.pop().release()

    def _leave_alone_what_stays(self) -> None:
        for holder in self._holders:
            attributes = vars(holder)
            homes = (attributes, attributes.get("_buffers", {}), attributes.get("_parameters", {}))
            for value in (value for home in homes for value in home.values()):
                if isinstance(value, torch.Tensor) and (stored := self._known.get(_key(value))) is not None:
                    self.bring([value], stored.lane)
                    del self._known[_key(value)]
                    del self._by_lane[stored.lane][_key(value)]
                    self._kept.add(_key(value))

    def _unpack(self, packed: tuple[torch.Tensor, int]) -> torch.Tensor:
        tensor, version = packed
        self.bring([tensor])
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of "
                f"shape {list(tensor.shape)}"
            )
        return tensor


class _Guard(TorchDispatchMode):
    """Fills what operations ask for, and notes what they make. lane: whose code runs; None: none's, nothing is noted."""

    def __init__(self, storages: LaneStorages, lane: int | None) -> None:
        super().__init__()
        self._storages = storages
        self._lane = lane

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        self._storages.bring(given, self._lane)
        result = function(*args, **kwargs)
        if function._schema.is_mutable:
            self._storages.changed(given)
        if self._lane is not None:
            before = {_key(tensor) for tensor in given}
            for tensor in _tensors(result):
                if _key(tensor) not in before:
                    self._storages._note(tensor, self._lane)
        return result


def _pack(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    return tensor.detach(), tensor._version


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
