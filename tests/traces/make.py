"""Makes up small traces in the formats that `sim.datacenter.traces` reads; no figure in them is from a real trace.

Run as a script it writes those of the bundled scenarios to scenarios/traces.
"""

from __future__ import annotations

import io
import math
import sqlite3
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

from sim.datacenter.traces import bitbrains
from sim.datacenter.traces.openb import NODES, PODS
from sim.streams import generator

FOLDER = Path(__file__).parents[2] / "scenarios" / "traces"
POD_HEADER = (
    "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time"
)
NODE_HEADER = "sn,cpu_milli,memory_mib,gpu,model"
START_MS = 1_600_000_000_000
"""When the made-up Bitbrains trace begins; any time would do."""


def day(seed: int, name: str, samples: int) -> npt.NDArray[np.float64]:
    """CPU use in percent over a day: a level of its own, more of it by day than by night, and noise."""
    random = generator(seed, "day", name)
    base, swing = random.gamma(2.0, 6.0), random.uniform(0, 25)
    hours = np.arange(samples) * 5 / 60
    wave = np.clip(np.sin((hours - 8) / 24 * 2 * math.pi), 0, None)
    return np.clip(base + swing * wave + random.normal(0, 3, samples), 0, 100)


def pods(seed: int, count: int, span_s: int) -> Iterator[str]:
    """Rows of openb: arrivals all over the span, lifetimes with a long tail, sizes that are powers of two."""
    random = generator(seed, "pods")
    created = np.sort(random.integers(0, span_s, count)).tolist()
    for number, time in enumerate(created):
        life = max(1, round(float(random.lognormal(8.0, 1.5))))
        wait = int(random.integers(0, 60))
        cores = int(random.choice([1, 2, 4, 8], p=[0.4, 0.3, 0.2, 0.1]))
        memory = 1024 * cores * int(random.choice([1, 2, 4]))
        times = f"{time},{time + wait + life},{time + wait}"
        yield f"pod-{number:04d},{cores * 1000},{memory},0,0,,LS,Succeeded,{times}"


def write_openb(folder: Path, rows: Iterable[str], nodes: Mapping[tuple[int, int], int]) -> Path:
    """Write pods and nodes; *nodes* counts those of so many thousandths of a core and MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / PODS).open("w", newline="\n") as file:
        file.writelines(f"{line}\n" for line in chain([POD_HEADER], rows))
    sizes = [size for size, count in nodes.items() for _ in range(count)]
    lines = (f"node-{number:04d},{cpu},{memory},0," for number, (cpu, memory) in enumerate(sizes))
    (folder / NODES).write_text("\n".join([NODE_HEADER, *lines, ""]), newline="\n")
    return folder


def write_planetlab(folder: Path, guests: int, samples: int = 288, seed: int = 1) -> Path:
    """Write a file of whole percentages for each guest."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(guests):
        name = f"node{number:03d}_example_org_slice"
        levels = np.rint(day(seed, name, samples)).astype(int).tolist()
        (folder / name).write_text("\n".join(map(str, levels)), newline="\n")
    return folder


def google_files(guests: int, samples: int = 288, seed: int = 1) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of files with two columns of percentages."""
    for number in range(guests):
        name = f"vm_{number:03d}"
        memory = 5 + day(seed, f"{name} memory", samples) / 2
        lines = (
            f"{cpu!r} {used!r}" for cpu, used in zip(day(seed, name, samples).tolist(), memory.tolist(), strict=True)
        )
        yield name, "\n".join([*lines, ""]).encode()


def write_google(file: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """Pack files as the tar.gz of the Google guests."""
    with tarfile.open(file, "w:gz") as archive:
        for name, content in files:
            member = tarfile.TarInfo(f"GCD_VMs/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def write_bitbrains(folder: Path, guests: int, samples: int = 288, seed: int = 1, later: bool = False) -> Path:
    """Write the list of guests and their samples, every second guest an hour after the first; *later*: as tasks and
    fragments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = [str(1000 + number) for number in range(guests)]
    cores = [1 << number % 4 for number in range(guests)]
    starts = [START_MS + number % 2 * 3_600_000 for number in range(guests)]
    step, length = 300_000, samples * 300_000
    capacity = [2600.0 * each for each in cores]
    usage = [day(seed, name, samples) / 100 * each for name, each in zip(ids, capacity, strict=True)]
    time = pa.timestamp("ms", "UTC")
    listed = {
        "id": ids,
        "cpu_count": pa.array(cores, pa.int32()),
        "cpu_capacity": capacity,
        "mem_capacity": [each * 2 * 1024 * 1024 for each in cores],
    }
    if later:
        listed |= {"submission_time": pa.array(starts, time), "duration": pa.array([length] * guests, pa.int64())}
        when = {"duration": np.full(guests * samples, step)}
    else:
        stops = [start + length for start in starts]
        listed |= {"start_time": pa.array(starts, time), "stop_time": pa.array(stops, time)}
        ends = [start + step * (1 + sample) for start in starts for sample in range(samples)]
        when = {"timestamp": pa.array(ends, time), "duration": np.full(guests * samples, step)}
    rows = {"id": [name for name in ids for _ in range(samples)], **when, "cpu_usage": np.concatenate(usage)}
    for name, table in zip(bitbrains.LAYOUTS[later], (listed, rows), strict=True):
        parquet.write_table(pa.table(table), folder / name)
    return folder


def azure_rows(guests: int, seed: int = 1) -> Iterator[tuple[int, int, int, int, float, float | None]]:
    """Yield rows of `vm`: 14 days, a tenth there from before, a tenth that stay."""
    random = generator(seed, "azure")
    for number in range(guests):
        start = random.uniform(-5, 0) if number % 10 == 0 else random.uniform(0, 14)
        end = None if number % 10 == 1 else start + random.exponential(2) + 0.001
        yield number, number % 7, number % 3, number % 2, start, end


def write_azure(file: Path, rows: Iterable[tuple[object, ...]]) -> Path:
    """Write requests for three types on two machines."""
    types = [(n, n % 3, n // 3, (1 + n % 3) / 32, (1 + n % 3) / 64, 0.0, 0.01, 0.01) for n in range(6)]
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE vm (vmId, tenantId, vmTypeId, priority, starttime REAL, endtime REAL)")
        database.execute("CREATE TABLE vmType (id, vmTypeId, machineId, core REAL, memory REAL, hdd, ssd, nic)")
        database.executemany("INSERT INTO vm VALUES (?, ?, ?, ?, ?, ?)", rows)
        database.executemany("INSERT INTO vmType VALUES (?, ?, ?, ?, ?, ?, ?, ?)", types)
    return file


def bundled(folder: Path) -> None:
    """Write the traces of the bundled scenarios."""
    write_openb(
        folder / "openb", pods(1, 400, 86_400), {(16_000, 65_536): 12, (32_000, 131_072): 8, (64_000, 262_144): 4}
    )
    write_planetlab(folder / "planetlab", 64)


if __name__ == "__main__":
    bundled(FOLDER)
