"""BPF maps."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from pathlib import Path

from crablb.kernel._libbpf import ffi, lib
from crablb.kernel.bpf.descriptor import Descriptor, open_pin
from crablb.kernel.bpf.errors import BpfError, check, take_log

__all__ = ["Map"]


def possible_cpus() -> int:
    """How many values a per-CPU map has.  Raises :class:`BpfError`."""
    what = "cannot read /sys/devices/system/cpu/possible; mount it: mount -t sysfs sysfs /sys"
    return check(lib.libbpf_num_possible_cpus(), what)


class Map(Descriptor):
    """A BPF map.  Keys and values are bytes of exactly ``key_size`` and ``value_size``."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        info = self._info("bpf_map_info")
        self.type = int(info.type)
        self.id = int(info.id)
        self.name = bytes(ffi.string(info.name)).decode()
        self.key_size = int(info.key_size)
        self.value_size = int(info.value_size)
        self.max_entries = int(info.max_entries)
        self.per_cpu = self.type in (
            lib.BPF_MAP_TYPE_PERCPU_HASH,
            lib.BPF_MAP_TYPE_PERCPU_ARRAY,
            lib.BPF_MAP_TYPE_LRU_PERCPU_HASH,
        )

    @classmethod
    def from_pin(cls, path: Path | str) -> Map:
        return cls(open_pin(path))

    def _key(self, key: bytes | int) -> bytes:
        if isinstance(key, int):
            key = key.to_bytes(self.key_size, "little")
        if len(key) != self.key_size:
            raise ValueError(f"map {self.name}: a key has {self.key_size} bytes, not {len(key)}")
        return key

    def lookup(self, key: bytes | int) -> bytes | None:
        """The value of ``key`` (all CPUs' values one after the other for a per-CPU map), or None."""
        size = self.value_size
        if self.per_cpu:
            size = (size + 7) // 8 * 8 * possible_cpus()
        value = ffi.new("uint8_t[]", size)
        rc = lib.bpf_map_lookup_elem(self.fd, self._key(key), value)
        if rc == -errno.ENOENT:
            return None
        check(rc, f"cannot read map {self.name}")
        return bytes(ffi.buffer(value))

    def lookup_percpu(self, key: bytes | int) -> list[bytes]:
        """One value a possible CPU; raises KeyError for a missing key."""
        value = self.lookup(key)
        if value is None:
            raise KeyError(key)
        stride = (self.value_size + 7) // 8 * 8
        return [value[i : i + self.value_size] for i in range(0, len(value), stride)]

    def sum_u64(self, key: bytes | int) -> int:
        """Sum over the CPUs of a ``__u64`` value."""
        return sum(int.from_bytes(v, "little") for v in self.lookup_percpu(key))

    def update(self, key: bytes | int, value: bytes | int, flags: int = 0) -> None:
        if isinstance(value, int):
            value = value.to_bytes(self.value_size, "little")
        if len(value) != self.value_size:
            raise ValueError(f"map {self.name}: a value has {self.value_size} bytes, not {len(value)}")
        if self.per_cpu:  # the same for every CPU
            value = value.ljust((self.value_size + 7) // 8 * 8, b"\0") * possible_cpus()
        rc = lib.bpf_map_update_elem(self.fd, self._key(key), value, flags)
        if rc == -errno.E2BIG:
            raise BpfError(f"map {self.name} is full ({self.max_entries} entries)", errno.E2BIG, take_log())
        check(rc, f"cannot write map {self.name}")

    def delete(self, key: bytes | int) -> bool:
        """Delete ``key``; False if it was not there."""
        rc = lib.bpf_map_delete_elem(self.fd, self._key(key))
        if rc == -errno.ENOENT:
            return False
        check(rc, f"cannot delete from map {self.name}")
        return True

    def keys(self) -> Iterator[bytes]:
        key, following = ffi.NULL, ffi.new("uint8_t[]", self.key_size)
        while lib.bpf_map_get_next_key(self.fd, key, following) == 0:
            found = bytes(ffi.buffer(following))
            yield found
            key = found

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        for key in list(self.keys()):
            value = self.lookup(key)
            if value is not None:  # it may have gone meanwhile
                yield key, value

    def dump(self, batch: int = 16384) -> tuple[bytes, bytes]:
        """Keys and values of a whole hash map, one after the other (BPF_MAP_LOOKUP_BATCH).

        What changes meanwhile may be missing or be there twice.
        """
        place, count = ffi.new("uint32_t *"), ffi.new("__u32 *")
        all_keys, all_values = [], []
        first = True
        while True:
            keys = ffi.new("uint8_t[]", batch * self.key_size)
            values = ffi.new("uint8_t[]", batch * self.value_size)
            count[0] = batch
            rc = lib.bpf_map_lookup_batch(self.fd, ffi.NULL if first else place, place, keys, values, count, ffi.NULL)
            if rc == -errno.ENOSPC:  # a bucket holds more than this
                batch *= 2
                continue
            if rc and rc != -errno.ENOENT:
                check(rc, f"cannot read map {self.name}")
            all_keys.append(ffi.buffer(keys, count[0] * self.key_size)[:])
            all_values.append(ffi.buffer(values, count[0] * self.value_size)[:])
            first = False
            if rc:  # ENOENT: that was all
                return b"".join(all_keys), b"".join(all_values)

    def mmap(self) -> mmap.mmap:
        """The whole of a ``BPF_F_MMAPABLE`` array, shared with the kernel and writable."""
        length = (self.value_size + 7) // 8 * 8 * self.max_entries
        page = mmap.PAGESIZE
        return mmap.mmap(self.fd, (length + page - 1) // page * page)
