"""`overcommit lab capture`: real memory as an image."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sim.cli.console import Console, as_json, table
from sim.cli.options import duration, talks

if TYPE_CHECKING:
    from sim.lab.capture import Taken


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The image to write, NAME.npz.")
@click.option("--pid", type=click.IntRange(min=1), help="Capture this process.")
@click.option("--ram", type=click.Path(path_type=Path), help="Capture a QEMU guest: its memory-backend-file, share=on.")
@click.option("--core", type=click.Path(path_type=Path), help="Capture an ELF core, or a file of dump-guest-memory.")
@click.option(
    "--mappings",
    type=click.Choice(["mergeable", "private", "all"]),
    default="private",
    show_default=True,
    help="Of a process: what KSM may scan, what it could, or file pages and shared memory too.",
)
@click.option(
    "--every", "every_ns", default="0", callback=duration, metavar="TIME", help="Take a snapshot every 10s ..."
)
@click.option("--for", "for_ns", default="0", callback=duration, metavar="TIME", help="... for 2min.")
@click.option(
    "--comparable",
    type=click.Path(path_type=Path),
    metavar="KEY",
    help="Number contents alike in all captures with this key file, which is made if missing. Keep it to yourself.",
)
@click.option("--compress", is_flag=True, help="Also note each page's size under LZ4.")
@talks
@click.pass_obj
def capture(console: Console, /, out: Path, **options: Any) -> None:
    """Capture real memory as an image that scenarios replay: which pages are equal, and when they change.

    No contents are written, and without KEY no fingerprints either.
    """
    from sim.lab.capture import capture as take

    try:
        with console.progress(out.name) as progress:
            taken = take(out, progress=progress, **options)
    except KeyboardInterrupt:
        console.kept = out if out.exists() else None
        raise
    if taken.stopped:
        console.say(f"{taken.stopped}; kept what was there before (snapshots: {taken.snapshots})")
    console.data(as_json({**asdict(taken), "file": str(out)}) if console.json else _capture_text(taken, console))


def _capture_text(taken: Taken, console: Console) -> str:
    """Return what a capture holds, and last its file."""
    from sim.columns import PAGE_BYTES
    from sim.units import about_bytes

    if console.quiet:
        return str(taken.file)
    rows = [("snapshots", str(taken.snapshots), "")]
    for name, pages in (
        ("pages", taken.pages),
        ("touched", taken.touched_pages),
        ("zeros", taken.zero_pages),
        ("different contents", taken.contents),
    ):
        rows.append((name, str(pages), about_bytes(pages * PAGE_BYTES)))
    return "\n".join([table(rows), str(taken.file)])
