"""This machine's KSM under exclusive control: settings are saved first and put back whatever happens.

Source: Documentation/admin-guide/mm/ksm.rst (knobs and counters), Documentation/scheduler/sched-stats.rst (CPU time).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn, TypedDict

from sim import files
from sim.errors import MachineError
from sim.lab.undo import Kind, undo
from sim.limits import available_bytes

KSM: Final = Path("/sys/kernel/mm/ksm")
THP: Final = Path("/sys/kernel/mm/transparent_hugepage")
LOCK: Final = Path("/run/overcommit-lab.lock")
STATE: Final = Path("/run/overcommit-lab.json")
TOKEN_VARIABLE: Final = "OVERCOMMIT_LAB"

COUNTERS: Final = (
    "full_scans",
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "pages_scanned",
    "pages_skipped",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
    "general_profit",
    "run",
    "pages_to_scan",
    "sleep_millisecs",
)
"""Files with one number each, counters and settings, that are read over time."""

VMSTAT: Final = ("cow_ksm", "thp_split_page", "thp_collapse_alloc")
"""Lines of /proc/vmstat that are read over time."""

DEFAULTS: Final[Mapping[str, int | str]] = {
    "pages_to_scan": 100,
    "sleep_millisecs": 20,
    "smart_scan": 1,
    "max_page_sharing": 256,
    "merge_across_nodes": 1,
    "use_zero_pages": 0,
    "stable_node_chains_prune_millisecs": 2000,
    "advisor_target_scan_time": 200,
    "advisor_max_cpu": 70,
    "advisor_min_pages_to_scan": 500,
    "advisor_max_pages_to_scan": 30000,
    "advisor_mode": "none",
}

_THREADS: Final = ("ksmd", "khugepaged")
_MEMORY_RESERVE: Final = 512 << 20
_KILL_TIMEOUT_S: Final = 10.0


class _Scheduling(TypedDict):
    """How a thread of the kernel is scheduled."""

    cpus: list[int]
    policy: int
    priority: int


class _State(TypedDict):
    """What is put back: knobs of KSM and of huge pages, how threads were scheduled, and what else was set up."""

    token: str
    knobs: dict[str, str]
    thp: dict[str, str]
    threads: dict[str, _Scheduling]
    set_up: list[tuple[Kind, str]]


class Ksm:
    """The kernel's KSM, held by one process at a time (see `exclusive`)."""

    def __init__(self, token: str) -> None:
        self.token = token
        self._ksmd = _ksmd_pid()
        names = [name for name in COUNTERS if (KSM / name).exists()]
        self._files = {name: os.open(KSM / name, os.O_RDONLY) for name in names}
        self._vmstat = os.open("/proc/vmstat", os.O_RDONLY)
        self._cpus = os.open("/proc/stat", os.O_RDONLY)
        self._schedstat = os.open(f"/proc/{self._ksmd}/schedstat", os.O_RDONLY)
        self._stat = os.open(f"/proc/{self._ksmd}/stat", os.O_RDONLY)

    def close(self) -> None:
        """Release the counter files."""
        for descriptor in (*self._files.values(), self._vmstat, self._cpus, self._schedstat, self._stat):
            os.close(descriptor)

    def get(self, knob: str) -> str:
        """One knob as the kernel shows it; the chosen word where it offers several."""
        return _read_knob(knob)

    def read(self, counter: str) -> int:
        """One counter, in about a microsecond."""
        return int(os.pread(self._files[counter], 64, 0))

    def counters(self) -> dict[str, int]:
        """All KSM counters, those of `VMSTAT`, `ksmd_cpu_ns` and `stolen_ns`, read one after the other."""
        values = {name: int(os.pread(descriptor, 64, 0)) for name, descriptor in self._files.items()}
        values |= vm_events(*VMSTAT, descriptor=self._vmstat)
        values["ksmd_cpu_ns"] = self.ksmd_cpu_ns()
        values["stolen_ns"] = self.stolen_ns()
        return values

    def ksmd_cpu_ns(self) -> int:
        """CPU time of ksmd in ns, exact while it sleeps and at most one tick behind while it runs."""
        return int(os.pread(self._schedstat, 64, 0).split()[0])

    def ksmd_runs(self) -> int:
        """How often ksmd was put on a core; constant for as long as it sleeps."""
        return int(os.pread(self._schedstat, 64, 0).split()[2])

    def interference(self) -> tuple[int, int]:
        """What disturbs ksmd, since boot: pages migrated, and time in ns for which it waited for a core."""
        migrated = vm_events("pgmigrate_success", descriptor=self._vmstat)["pgmigrate_success"]
        return migrated, int(os.pread(self._schedstat, 64, 0).split()[1])

    def stolen_ns(self) -> int:
        """Time for which the hypervisor took ksmd's core away, since boot."""
        # That core is the last one (see `isolate`); its line ends with steal, guest and guest_nice.
        lines = os.pread(self._cpus, 1 << 16, 0).splitlines()
        ticks = int([line for line in lines if line.startswith(b"cpu")][-1].split()[8])
        return ticks * (10**9 // os.sysconf("SC_CLK_TCK"))

    def ksmd_asleep(self) -> bool:
        """Whether ksmd sleeps between two batches (not when it waits for a lock or a core inside one)."""
        return os.pread(self._stat, 64, 0).split()[2] == b"S"

    def reset(self, **knobs: int | str) -> None:
        """Unmerge everything, forget every page, stop ksmd and start again from the kernel's defaults and `knobs`.

        `pages_scanned`, `pages_skipped`, `cow_ksm` and `ksmd_cpu_ns` keep counting: take a baseline.
        """
        _forget_pages()
        available = {name: value for name, value in DEFAULTS.items() if (KSM / name).exists()}
        self.set(**{**available, **knobs})

    def isolate(self) -> set[int]:
        """Give ksmd a core, ahead of all ordinary work; return the other cores (all cores where there is only one)."""
        cores = os.sched_getaffinity(0)
        others = cores - {max(cores)}
        if not others:
            return cores
        _schedule(self._ksmd, {"cpus": [max(cores)], "policy": os.SCHED_FIFO, "priority": 1})
        return others

    def set(self, **knobs: int | str) -> None:
        """Write knobs in an order the kernel accepts; MachineError names the knob it refuses."""
        for name, value in _writing_order(knobs):
            _write_knob(name, value)

    def set_thp(self, **knobs: int | str) -> None:
        """Write settings of huge pages, `enabled` and those of khugepaged by their own names; it then runs undisturbed.

        Otherwise khugepaged, the nicest of all, would wait for any work that this machine happens to have.
        """
        for name, value in knobs.items():
            _write(THP / name if name == "enabled" else THP / "khugepaged" / name, value)
        pid = _thread("khugepaged")
        if pid is not None:
            os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))


def vm_events(*names: str, descriptor: int | None = None) -> dict[str, int]:
    """Lines of /proc/vmstat; 0 for what the kernel does not count."""
    text = b"\n" + (Path("/proc/vmstat").read_bytes() if descriptor is None else _read_whole(descriptor))
    rests = {name: text.partition(f"\n{name} ".encode())[2] for name in names}
    return {name: int(rest.split(maxsplit=1)[0]) if rest else 0 for name, rest in rests.items()}


def _read_whole(descriptor: int) -> bytes:
    text = b""
    while chunk := os.pread(descriptor, 1 << 16, len(text)):
        text += chunk
    return text


def check_abilities() -> None:
    """Raise MachineError where no lab can ever run: without root, or without KSM."""
    if os.geteuid() != 0:
        raise MachineError("the lab changes KSM's settings and needs root: run it with sudo")
    if not KSM.is_dir():
        raise MachineError(f"this kernel has no KSM ({KSM} is missing): a kernel built with CONFIG_KSM is needed")


@contextlib.contextmanager
def exclusive(needed_bytes: int = 0) -> Iterator[Ksm]:
    """Hold this machine's KSM: alone, from a clean start, with everything put back at the end.

    An interrupted lab is healed first. `needed_bytes` is the memory the caller's guests will touch.
    Raises MachineError where this machine cannot do it: no root, no KSM, KSM in use, too little memory.
    """
    check_abilities()
    with _lock(), _unwinding_on_signals():
        _heal()
        _check_nobody_uses_ksm()
        _check_memory(needed_bytes)
        state = _save()
        ksm = Ksm(state["token"])
        try:
            ksm.reset()
            yield ksm
        finally:
            ksm.close()
            with _signals_held():
                _heal()


@contextlib.contextmanager
def borrowed(kind: Kind, what: str) -> Iterator[None]:
    """Note in the state file what is about to be set up, and undo it at the end, or in `_heal` if there is no end.

    Only inside `exclusive`.
    """
    state = _kept()
    state["set_up"].append((kind, what))
    _keep(state)
    try:
        yield
    finally:
        with _signals_held():
            undo(kind, what)
            state = _kept()
            state["set_up"].pop()
            _keep(state)


def restore() -> bool:
    """Put back what an interrupted lab left and end its guests; True if there was anything to do."""
    check_abilities()
    with _lock():
        return _heal()


def _check_nobody_uses_ksm() -> None:
    users = [entry.name for entry in _processes() if _uses_ksm(entry)]
    if users:
        raise MachineError(
            f"KSM is in use by other processes (pid {', '.join(users[:5])}): stop them, the lab needs KSM alone"
        )


def _uses_ksm(process: Path) -> bool:
    """Whether the process has, or will have, pages that ksmd scans."""
    text = _read_gone(process / "ksm_stat").decode()
    fields = dict(line.replace(":", " ").split() for line in text.splitlines())
    return "yes" in fields.values() or int(fields.get("ksm_rmap_items", 0)) > 0


def _check_memory(needed: int) -> None:
    available = available_bytes()
    if needed + _MEMORY_RESERVE > available:
        raise MachineError(
            f"the guests need {needed >> 20} MiB and a reserve of {_MEMORY_RESERVE >> 20} MiB, "
            f"but {available >> 20} MiB are available: use fewer or smaller guests"
        )


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    with LOCK.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError("another lab is running on this machine: wait until it ends") from None
        yield


@contextlib.contextmanager
def _unwinding_on_signals() -> Iterator[None]:
    """Turn the signals that end a process into exceptions, so that settings are put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, _unwind) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _unwind(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _save() -> _State:
    writable = [file.name for file in KSM.iterdir() if file.stat().st_mode & 0o200]
    state = _State(
        token=uuid.uuid4().hex,
        knobs={name: _read_knob(name) for name in sorted(writable)},
        thp=_thp_knobs(),
        threads={name: _scheduling(pid) for name in _THREADS if (pid := _thread(name)) is not None},
        set_up=[],
    )
    _keep(state)
    return state


def _keep(state: _State) -> None:
    files.publish(STATE, json.dumps(state, indent=1).encode())


def _kept() -> _State:
    state: _State = json.loads(STATE.read_text())
    return state


def _heal() -> bool:
    """End the guests of the lab that wrote the state file, and put back what it says."""
    if not STATE.exists():
        return False
    state = _kept()
    _end_guests(state["token"])
    for kind, what in reversed(state["set_up"]):
        undo(kind, what)
    _forget_pages()
    for name, value in _writing_order(state["knobs"]):
        _write_knob(name, value)
    for name, value in state["thp"].items():
        _write(THP / name, value)
    for name, scheduling in state["threads"].items():
        pid = _thread(name)
        if pid is not None:
            _schedule(pid, scheduling)
    STATE.unlink()
    return True


def _end_guests(token: str) -> None:
    mark = f"{TOKEN_VARIABLE}={token}".encode()
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while guests := [entry for entry in _processes() if mark in _read_gone(entry / "environ").split(b"\0")]:
        for entry in guests:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)
        if time.monotonic() > deadline:
            raise MachineError(f"guest processes {[entry.name for entry in guests]} cannot be ended")
        time.sleep(0.01)


def _forget_pages() -> None:
    # Writing 2 where it is 2 already does nothing, so ksmd is stopped first.
    for value in (0, 2, 0):
        _write_knob("run", value)


def _writing_order(knobs: Mapping[str, int | str]) -> list[tuple[str, int | str]]:
    """The advisor is switched off before the knobs it guards are written, and on after them; `run` comes last."""
    writes = [(name, value) for name, value in knobs.items() if name not in ("advisor_mode", "run")]
    if "advisor_mode" in knobs:
        writes.insert(0, ("advisor_mode", "none"))
        if knobs["advisor_mode"] != "none":
            writes.append(("advisor_mode", knobs["advisor_mode"]))
    if "run" in knobs:
        writes.append(("run", knobs["run"]))
    return writes


def _write_knob(name: str, value: int | str) -> None:
    _write(KSM / name, value)


def _write(file: Path, value: int | str) -> None:
    try:
        file.write_text(str(value))
    except OSError as error:
        raise MachineError(f"the kernel refuses {file.name} = {value}: {error.strerror}") from error


def _read_knob(name: str) -> str:
    return _read(KSM / name)


def _read(file: Path) -> str:
    text = file.read_text().strip()
    return text.partition("[")[2].partition("]")[0] or text


def _thp_knobs() -> dict[str, str]:
    """Settings of huge pages, by the file's path below theirs."""
    files = [THP / "enabled", *(THP / "khugepaged").iterdir()] if THP.is_dir() else []
    return {str(file.relative_to(THP)): _read(file) for file in files if file.stat().st_mode & 0o200}


def _processes() -> Iterator[Path]:
    """The /proc folders of all processes but this one."""
    own = str(os.getpid())
    return (entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and entry.name != own)


def _read_gone(file: Path) -> bytes:
    """A /proc file of a process; empty when it has ended, belongs to someone who hides it, or has no such file."""
    try:
        return file.read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def _ksmd_pid() -> int:
    pid = _thread("ksmd")
    if pid is None:
        raise MachineError("this kernel has KSM but no ksmd thread is visible: run the lab outside a container")
    return pid


def _thread(name: str) -> int | None:
    """A thread of the kernel by its name."""
    comm = f"{name}\n".encode()
    return next((int(entry.name) for entry in _processes() if _read_gone(entry / "comm") == comm), None)


def thread_cpu_ns(name: str) -> int:
    """CPU time in ns that a thread of the kernel has used; 0 where there is none."""
    pid = _thread(name)
    return 0 if pid is None else int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def _scheduling(pid: int) -> _Scheduling:
    cpus, priority = sorted(os.sched_getaffinity(pid)), os.sched_getparam(pid).sched_priority
    return {"cpus": cpus, "policy": os.sched_getscheduler(pid), "priority": priority}


def _schedule(pid: int, scheduling: _Scheduling) -> None:
    os.sched_setaffinity(pid, scheduling["cpus"])
    os.sched_setscheduler(pid, scheduling["policy"], os.sched_param(scheduling["priority"]))
