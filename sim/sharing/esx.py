"""A host with ESX over time: page sharing in the background, and what is done about too little memory.

Once a second ESX scans, looks at its free memory and acts on it; a guest that needs a frame while there are too few
waits until some were reclaimed. Sources: see `tps.py`. Not published, and assumed here: by how much free memory must
exceed a threshold before a state is left (`_LEAVES`), the weights of the moving averages of activity (`_AVERAGES`),
that sharing which is called for takes one core at most and looks at every page once, and that large pages are broken in
the state high where the scan meets them. Large pages that were broken stay so: when ESX makes new ones is not told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from sim.memory import pages as memory
from sim.memory.guest import Vm
from sim.memory.pages import BLOCK, PAGE_BYTES, Float64, Int32, Int64, UInt8, UInt16
from sim.reclaim import pressure
from sim.sharing import tps_pass as tps
from sim.sharing.room import OutOfFrames, Room, Site, longer, memory_columns
from sim.sharing.tps import STATES, Rung, Tps
from sim.units import MIB, SECOND, about_bytes

_TICK: Final = SECOND
"""The balloon driver asks once a second what it shall do (OSDI 2002, section 3.2)."""
_BALANCE: Final = 15
"""Ticks from one reallocation of memory to the next (Mem.BalancePeriod, ESX Server 2 manual)."""
_SAMPLES: Final = 100
"""Pages sampled of each VM to see how much of its memory it uses (OSDI 2002, section 5.3)."""
_GIVES: Final = 588_000
"""Pages a second that a balloon takes: 1.7 us each (Liu and others, TPDS 2015, section 4)."""
_NORMAL: Final = 10
"""Shares for each MB of a VM (vSphere resource management guide: normal)."""
_LEAVES: Final = 1.05
_AVERAGES: Final = (1 / 8, 1 / 2)

_HALF: Final = 128
"""Size of a compressed page of 2 KiB as `reclaim/compression.py` tells it."""

_ENTRIES: Final = 1024
_OUT: Final = [tps.SWAPPED_OUT, tps.ZIPPED_OUT, tps.GIVEN]

_COUNTERS: Final = 1
_COUNTS: Final = _COUNTERS + tps.COUNTERS
_CPU: Final = _COUNTS + memory.COUNTS


class Esx(Room):
    """Memory of one host with ESX."""

    WORK = tps.WORK
    ROW = _CPU + 2

    def __init__(self, settings: Tps, site: Site) -> None:
        """*settings* are complete for their version; of the squeeze only the device counts, the rest is Linux' own."""
        super().__init__(settings, replace(site, squeeze=None))
        self.m.counts[memory.SPLITS_LATER] = 0  # Linux' own
        squeeze = site.squeeze
        if squeeze and squeeze.device:
            self.r = self.r._replace(channel=np.zeros(squeeze.device.channels, np.int64))
            self.r.n[pressure.READ_NS] = squeeze.device.read_ns
            self.r.n[pressure.PAGE_NS] = squeeze.device.ns_per_page
            self.r.n[pressure.IN_NS] = squeeze.device.cpu_in_ns
        self._settings = settings
        self._work_ps = site.work_ps
        room = len(self.m.place)
        self.t = tps.Tps(
            out=np.zeros(room, np.uint8),
            small=np.zeros(room, np.uint8),
            hint=np.zeros(room, np.int32),
            bucket=np.zeros(_ENTRIES, np.int32),
            entry=np.zeros((_ENTRIES, tps.ENTRY_COLUMNS), np.int64),
            guest=np.zeros((site.guests, tps.GUEST_COLUMNS), np.int64),
            n=np.zeros(tps.NUMBERS, np.int64),
        )
        self.t.n[tps.KEY] = np.uint64(site.key).astype(np.int64)
        self.t.n[tps.MOST_SWAPPED] = squeeze.slots if squeeze else memory.END_OF_TIME
        thresholds, goal = settings.thresholds(site.frames * PAGE_BYTES)
        self._thresholds = [each // PAGE_BYTES for each in thresholds]
        self._goal = goal // PAGE_BYTES
        self._proactive = settings.proactive
        if self._proactive:
            self.t.n[tps.COLD_BELOW] = round(self._proactive.cold_below * 1e9)
        self.t.n[tps.FLOOR] = self._thresholds[-1]
        self._depth = 0
        self._now = 0
        self._next_tick = _TICK
        self._ticks = 0
        self._vms: dict[int, _Vm] = {}
        self._called: dict[int, int] = {}

    # --- guests ---------------------------------------------------------------------------------------------------

    def more_guests(self, guests: int, contents: int) -> None:
        """See `Room`."""
        super().more_guests(guests, contents)
        self.t = self.t._replace(guest=longer(self.t.guest, guests))

    def add(
        self, guest: int, pages: int, *, vm: Vm, key: int, now: int, level: float, node: int, thp: bool
    ) -> None:  # fmt: skip
        """See `Room`; the guest's configuration says what it is worth."""
        super().add(guest, pages, vm=vm, key=key, now=now, level=level, node=node, thp=False)
        own = self._settings.guests.get(vm.name)
        shares = (own and own.shares) or max(vm.memory * _NORMAL // MIB, 1)
        large = bool(self._settings.AllocGuestLargePage) and vm.huge_pages == "madvise"
        self._vms[guest] = _Vm(pages, shares, (own.min if own else 0) // PAGE_BYTES, large)
        row = self.t.guest[guest]
        row[:] = 0
        row[tps.NODE] = node
        row[tps.ZIP_MOST] = self._zipped_most(pages)
        row[tps.RUNS] = 1
        self._set_rates()
        self._set_large_pages()

    def _zipped_most(self, pages: int) -> int:
        if not self._settings.MemZipEnable:
            return 0
        return pages * self._settings.MemZipMaxPct // 100 * PAGE_BYTES // tps.ZIPPED_BYTES

    def _set_rates(self) -> None:
        guests = list(self._vms)
        rates = self._settings.rates([self._vms[guest].pages for guest in guests])
        for guest, rate in zip(guests, rates, strict=True):
            self.t.guest[guest, tps.RATE] = round(rate * self._haste(guest) * 1e6)

    def _haste(self, guest: int) -> float:
        """How many times faster than its settings say the guest is scanned, because much of it may be shared."""
        if not self._proactive:
            return 1.0
        seen, equal = self.t.guest[guest, [tps.SEEN, tps.EQUAL]]
        return 1 + (self._proactive.share_rate - 1) * float(equal / max(seen, 1))

    def _is_scarce(self) -> bool:
        """Whether so little memory is free that all large pages are broken."""
        return self._proactive is not None and self._free() < self._proactive.free_below * self.m.counts[memory.LIMIT]

    def _set_large_pages(self) -> None:
        """Guests touch memory in large pages while memory is plenty and nothing of theirs was taken."""
        plenty = self._rung is None and not self._is_scarce()
        for guest, vm in self._vms.items():
            self.m.guest[guest, memory.THP] = vm.large and plenty and not self.t.guest[guest, _OUT].any()

    def set_accesses(self, guest: int, accesses: UInt16) -> None:
        """See `Room`; the guest's kernel knows which pages it misses least."""
        super().set_accesses(guest, accesses)
        rates = self.m.rates
        often = rates[:, memory.WRITES] + rates[:, memory.READS]
        often[rates[:, memory.PERIOD] > 0] += 1 / rates[rates[:, memory.PERIOD] > 0, memory.PERIOD]
        self._set_order(guest, np.argsort(often[accesses], kind="stable").astype(np.int32))

    def _set_order(self, guest: int, order: Int32) -> None:
        """The guest's kernel misses its pages least in this order."""
        vm, classes = self._vms[guest], self.m.accesses[self.pages_of(guest)][order]
        vm.order, vm.ends = order, np.append(np.flatnonzero(np.diff(classes)) + 1, len(classes))

    def set_packed(self, guest: int, packed: UInt8) -> None:
        """See `Room`; ESX only keeps a page compressed that takes half a page or less."""
        self.t.small[self.pages_of(guest)] = packed <= _HALF

    def fill(self, guest: int, contents: Int32, now: int) -> None:
        """Touch the guest's pages for the first time, empty ones last to be missed. Raises OutOfFrames."""
        order = self._vms[guest].order
        empty = contents[order] == 0
        self._set_order(guest, np.concatenate([order[empty], order[~empty]]))
        pages = np.flatnonzero(contents != memory.NEVER)
        self.write(guest, pages, contents[pages], now)

    def write(self, guest: int, pages: Int64, contents: Int32, now: int) -> None:
        """Write contents to the guest's pages, as fast as memory can be reclaimed for it. Raises OutOfFrames."""
        first, done = int(self.m.guest[guest, memory.FIRST]), 0
        while True:
            done = tps.write_pages(self.m, self.t, self.r, first, pages, contents, done, now)
            if done == len(pages):
                return
            if not self._relieve(now):
                raise OutOfFrames(guest)

    def remove(self, guest: int) -> None:
        """The guest is powered off."""
        tps.forget_pages(self.m, self.t, guest)
        memory.drop_pages(self.m, *self.m.guest[guest, [memory.FIRST, memory.PAGES]])
        self._end(guest)
        self.t.guest[guest, tps.RUNS] = 0
        del self._vms[guest]
        self._called.pop(guest, None)
        self._give_back(guest)
        self._set_rates()

    def touched(self, guest: int) -> int:
        """See `Room`; what is in the balloon is nobody's."""
        return super().touched(guest) - int(self.t.guest[guest, tps.GIVEN])

    def swapped(self, guest: int) -> int:
        """See `Room`; compressed pages are swapped out too, as in zram."""
        return int(self.t.guest[guest, [tps.SWAPPED_OUT, tps.ZIPPED_OUT]].sum())

    # --- time -----------------------------------------------------------------------------------------------------

    def advance(self, horizon: int) -> Iterator[Int64]:
        """Let due accesses happen and ESX act up to *horizon*; there are no full scans to yield."""
        yield from ()
        while True:
            until = min(horizon, self._next_tick)
            self._act(until)
            self._now = until
            if until < self._next_tick:
                return
            self._tick(until)
            self._next_tick += _TICK

    def _act(self, until: int) -> None:
        while tps.access_due(self.m, self.t, self.r, until) != tps.PAUSED:
            time = int(memory.next_due(self.m))
            if not self._relieve(time):
                raise OutOfFrames(int(self.m.block[self.m.due[0, memory.PAGE] // 2 // BLOCK, memory.GUEST]), time)

    def _tick(self, now: int) -> None:
        self._ticks += 1
        self.t.guest[:, tps.CREDIT] += self.t.guest[:, tps.RATE]
        while tps.scan(self.m, self.t, now) != tps.PAUSED:
            self._make_room()
        if self._ticks * _TICK % self._settings.ways.sample_every == 0:
            self._estimate_activity()
        self._look_at_free_memory(now)
        if self._is_scarce():
            tps.break_all(self.m)
        rung = self._rung
        if rung is not None and rung.calls:
            self._share_now(now)
        if rung is not None and (rung.balloons or rung.swaps):
            self._balance(now, rung)
        elif self._ticks % _BALANCE == 0 and self.t.guest[:, tps.BALLOON].any():
            self._balance(now, None)
        for guest in self._vms:
            self._give(now, guest)
        self._set_large_pages()
        self._count_metadata()

    def _estimate_activity(self) -> None:
        every = self._settings.ways.sample_every
        for guest, vm in self._vms.items():
            vm.see(tps.active_pages(self.m, self.t, guest, _SAMPLES, every) / _SAMPLES)
        self._set_rates()

    # --- states of memory -----------------------------------------------------------------------------------------

    @property
    def _rung(self) -> Rung | None:
        return self._settings.ways.ladder[self._depth - 1] if self._depth else None

    def _free(self) -> int:
        return self.usage()[0] // PAGE_BYTES

    def _look_at_free_memory(self, now: int) -> None:
        """Find the state that memory is in; a better one is entered only well above its threshold."""
        free, before = self._free(), self._depth
        depth = sum(free < each for each in self._thresholds)
        leaving = sum(free < each * _LEAVES for each in self._thresholds)
        self._depth = max(depth, min(before, leaving))
        self.t.n[tps.FLOOR] = self._thresholds[-1]
        if self._depth == before:
            return
        rung = self._rung
        self.t.n[tps.STATE] = STATES.index(rung.state) if rung else 0
        self.t.n[tps.BREAKS] = bool(rung and rung.breaks)
        if not (rung and rung.calls):
            self._called.clear()
        threshold = self._thresholds[max(before, self._depth) - 1] * PAGE_BYTES
        side = "below" if self._depth > before else "above"
        kind = f"memory-{rung.state if rung else 'high'}"
        self.notes.append((now, kind, f"free memory {side} {about_bytes(threshold)}"))

    def _share_now(self, now: int) -> None:
        """Look at every page once, until the goal is reached, as far as one core comes."""
        price = sum(int(self._work_ps[each]) for each in (tps.W_VISIT, tps.W_CHECKSUM, tps.W_MERGE))
        left = _TICK * 1000 // max(price, 1)
        for guest in self._vms:
            why, at = tps.NO_ROOM, self._called.get(guest, 0)
            while why == tps.NO_ROOM:
                self._make_room()
                why, reached = tps.share_now(self.m, self.t, guest, at, left, self._goal, now)
                left, at = left - (reached - at), reached
            self._called[guest] = at

    def _relieve(self, now: int) -> bool:
        """A guest waits for a frame: reclaim some at once. Returns whether it was worth it."""
        self._make_room()
        self._look_at_free_memory(now)
        before = self._free()
        if before <= self.t.n[tps.FLOOR]:
            self._swap(now, self._targets(self._thresholds[-2] - before))
            # What a guest has above its target may be shared by all its mappers: nobody's to give.
            for guest, vm in self._vms.items():
                if self._free() <= self.t.n[tps.FLOOR]:
                    lacking = self._thresholds[-2] - self._free()
                    self._take(now, guest, min(tps.consumed(self.m, guest) - vm.least, lacking))
        if self._free() > self.t.n[tps.FLOOR] or self._free() > before:
            return True
        # Nothing can be reclaimed any more: the rest is free for all.
        self.t.n[tps.FLOOR] = 0
        return self._free() > 0

    # --- who gets how much ----------------------------------------------------------------------------------------

    def _targets(self, wanted: int) -> dict[int, int]:
        """Pages that each guest may hold when *wanted* frames are to be freed: where shares per page, with idle pages
        taxed, are equal (OSDI 2002, section 5.2).
        """
        guests = list(self._vms)
        held = np.array([tps.consumed(self.m, guest) for guest in guests], np.float64)
        need = held + self.t.guest[guests][:, _OUT].sum(axis=1)
        least = np.minimum([self._vms[guest].least for guest in guests], need)
        k = 1 / (1 - self._settings.IdleTax / 100)
        worth = np.array([vm.shares / (vm.active + k * (1 - vm.active)) for vm in self._vms.values()])
        targets = shared_out(max(held.sum() - wanted, 0.0), worth, least, need)
        return dict(zip(guests, targets.astype(int).tolist(), strict=True))

    def _balance(self, now: int, rung: Rung | None) -> None:
        """Let balloons and swapping bring every guest to its target; without a rung, balloons only get smaller."""
        lacking = self._goal - self._free()
        targets = self._targets(lacking if rung else min(lacking, 0))
        if rung is None or rung.balloons:
            for guest, target in targets.items():
                self._balloon(guest, target, _GIVES if rung else 0)
                self._give(now, guest)
        if rung is not None and (rung.swaps or self._settings.CtlMaxPercent == 0):
            self._swap(now, targets)

    def _balloon(self, guest: int, target: int, most_more: int) -> None:
        """Inflate or deflate the guest's balloon towards its target, by so many pages more at most."""
        vm, row = self._vms[guest], self.t.guest[guest]
        most = vm.pages * self._settings.CtlMaxPercent // 100
        wanted = min(max(tps.consumed(self.m, guest) + int(row[tps.GIVEN]) - target, 0), most)
        step = min(max(wanted - int(row[tps.BALLOON]), -_GIVES), most_more)
        row[tps.BALLOON] += step

    def _give(self, now: int, guest: int) -> None:
        """Let the guest's kernel give pages until its balloon is full: also those for what it brought back."""
        vm, row = self._vms[guest], self.t.guest[guest]
        lacking = int(row[tps.BALLOON] - row[tps.GIVEN])
        while lacking > 0:
            self._make_room()
            given = tps.give(self.m, self.t, guest, vm.order, vm.ends, lacking, now)
            lacking -= given
            if not given:
                row[tps.BALLOON] -= lacking
                return

    def _swap(self, now: int, targets: Mapping[int, int]) -> None:
        """Take what guests hold above their targets."""
        for guest, target in targets.items():
            self._take(now, guest, tps.consumed(self.m, guest) - target)

    def _take(self, now: int, guest: int, frames: int) -> None:
        """Take so many frames of a guest, of pages picked at random."""
        why, left = (tps.NO_ROOM, frames) if frames > 0 else (tps.PAUSED, 0)
        while why == tps.NO_ROOM:
            self._make_room()
            why, left = tps.reclaim(self.m, self.t, self.r, guest, left, now)
        self._count_metadata()

    # --- records --------------------------------------------------------------------------------------------------

    def _count_metadata(self) -> None:
        """Entries of the table, and the frames that compressed pages take."""
        entries = int(self.m.counts[memory.FRAMES] + self.t.n[tps.HINTS])
        self.m.counts[memory.METADATA] = entries * tps.ENTRY_BYTES
        self.m.counts[memory.POOL] = -(-int(self.t.n[tps.ZIPPED_NOW]) * tps.ZIPPED_BYTES // PAGE_BYTES)

    def snapshot(self, now: int) -> Int64:
        """See `Room`."""
        self._count_metadata()
        running = list(self._vms)
        zeros = np.unique((self.t.guest[running, tps.NODE] << 32) | self.m.guest[running, memory.ZEROS])
        self.t.n[tps.ZERO_SHARED] = tps.zero_shared(self.m, self.t, zeros)
        done = self.t.n[tps.DONE :] * self._work_ps
        merging = int(done[[tps.W_COMPARE_BYTE, tps.W_MERGE, tps.W_PROMOTE]].sum())
        cpu_ps = [int(done.sum()) - merging, merging]
        return np.array([now, *self.t.n[: tps.COUNTERS], *self.m.counts, *cpu_ps], np.int64)

    def columns(self, log: Int64) -> dict[str, npt.NDArray[Any]]:
        """See `Room`; what KSM counts too has KSM's names."""

        def counter(index: int) -> Int64:
            return log[:, _COUNTERS + index]

        def count(index: int) -> Int64:
            return log[:, _COUNTS + index]

        looking, merging = log[:, _CPU] // 1000, log[:, _CPU + 1] // 1000
        known = memory_columns(log[:, _COUNTS:_CPU])
        away = counter(tps.SWAPPED_NOW) + counter(tps.ZIPPED_NOW)
        return known | {
            "time_s": log[:, 0] / 1e9,
            "pages_shared": count(memory.FRAMES),
            "pages_sharing": count(memory.SHARERS) - count(memory.FRAMES),
            "pages_unshared": counter(tps.HINTS),
            "pages_scanned": counter(tps.PICKED),
            "ksmd_cpu_ns": looking + merging,
            "scan_cpu_ns": looking,
            "merge_cpu_ns": merging,
            "mem_touched_bytes": (count(memory.TOUCHED) + away) * PAGE_BYTES,
            "mem_swapped_bytes": away * PAGE_BYTES,
            "swap_used_bytes": counter(tps.SWAPPED_NOW) * PAGE_BYTES,
            "mem_state": counter(tps.STATE),
            "zero_pages_shared": counter(tps.ZERO_SHARED),
            "mem_ballooned_bytes": counter(tps.BALLOONED_NOW) * PAGE_BYTES,
            "mem_compressed_bytes": counter(tps.ZIPPED_NOW) * PAGE_BYTES,
            "guest_swpout": counter(tps.GUEST_OUTS),
            "guest_swpin": counter(tps.GUEST_INS),
        }

    def counters_of(self, guest: int) -> Mapping[str, int]:
        """See `Room`."""
        row = self.t.guest[guest]
        shared = np.count_nonzero(self.m.place[self.pages_of(guest)] & memory.SHARED)
        return {
            "ksm_merging_pages": int(shared),
            "balloon_bytes": int(row[tps.GIVEN]) * PAGE_BYTES,
            "compressed_bytes": int(row[tps.ZIPPED_OUT]) * PAGE_BYTES,
        }

    def work_done(self) -> dict[str, int]:
        """See `Room`."""
        return dict(zip(tps.WORK, self.t.n[tps.DONE :].tolist(), strict=True))

    # --- room -----------------------------------------------------------------------------------------------------

    def _more_blocks(self, wanted: int) -> int:
        first = super()._more_blocks(wanted)
        room = len(self.m.place)
        self.t = self.t._replace(
            out=longer(self.t.out, room), small=longer(self.t.small, room), hint=longer(self.t.hint, room)
        )
        return first

    def _make_room(self, frames: int = tps.ROOM, due: int = tps.ROOM) -> None:
        """See `Room`; the table of hashes grows when sweeping it does not help."""
        super()._make_room(frames, due)
        n = self.t.n
        if n[tps.ENTRY_FREE] == 0 and n[tps.ENTRY_HIGH] + tps.ROOM > len(self.t.entry):
            tps.sweep(self.m, self.t)
            if n[tps.ENTRY_FREE] == 0:
                size = 2 * len(self.t.entry)
                larger = self.t._replace(bucket=np.zeros(size, np.int32), entry=longer(self.t.entry, size))
                tps.refill(self.t, larger)
                self.t = larger


class _Vm:
    """What ESX knows of a VM."""

    def __init__(self, pages: int, shares: int, least: int, large: bool) -> None:
        self.pages = pages
        self.shares = shares
        self.least = least
        self.large = large
        self.order: Int32 = np.arange(pages, dtype=np.int32)
        """Its pages, those first that its own kernel misses least."""
        self.ends: Int64 = np.array([pages])
        """Where in that order each run of pages ends that it misses equally."""
        self.active = 1.0
        """Share of its memory that it uses, as estimated."""
        self._averages = [1.0 for _ in _AVERAGES]

    def see(self, share: float) -> None:
        """Take note of a new estimate: rising use is believed sooner than falling use (OSDI 2002, section 5.3)."""
        self._averages = [old + weight * (share - old) for old, weight in zip(self._averages, _AVERAGES, strict=True)]
        self.active = max(*self._averages, share)


def shared_out(total: float, worth: Float64, least: Float64, most: Float64) -> Float64:
    """Share *total* out in proportion to *worth*, but none less than *least* nor more than *most*."""
    if most.sum() <= total:
        return most
    low, high = 0.0, float((most / worth).max())
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * worth, least, most).sum() <= total else (low, middle)
    return cast(Float64, np.clip(low * worth, least, most))
