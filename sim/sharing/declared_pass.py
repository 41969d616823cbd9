"""Letting pages that are declared to be one map one frame, as a compiled loop.

The first page of a content lends its frame to all that follow; when the last of them is gone, so is the frame.
"""

from sim.memory import pages as memory
from sim.memory.compiled import compiled
from sim.memory.pages import Int32, Int64, Memory

ROOM = 4
"""Shared frames and due writes that one page may need, each."""


@compiled
def share_pages(m: Memory, frame_of: Int32, pages: Int64, start: int, now: int) -> int:
    """Let pages map the frames of their contents, from number *start* of a list on.

    `frame_of` has for each content its frame + 1. What is offered to KSM is left alone. Returns how many are done: all,
    or as far as there was room.
    """
    for at in range(start, pages.size):
        if m.counts[memory.FRAME_HIGH] + ROOM > m.frame.shape[0]:
            return at
        if m.counts[memory.DUE_COUNT] + ROOM > m.due.shape[0]:
            return at
        page = pages[at]
        if m.place[page] & (memory.PRESENT | memory.ZERO | memory.MERGEABLE) != memory.PRESENT:
            continue
        content = memory.content_now(m, page, now)
        if content <= 0:
            continue
        if memory.is_large(m, page // memory.BLOCK):
            memory.split_huge(m, page // memory.BLOCK, now)
        own = m.held[page] if m.place[page] & memory.SHARED else -1
        frame = frame_of[content] - 1
        known = frame >= 0 and m.frame[frame, memory.KIND] == memory.ANON and m.frame[frame, memory.MAPS] > 0
        if not known or m.frame[frame, memory.CONTENT] != content:
            frame = own if own >= 0 else memory.share_own_frame(m, page, content, memory.ANON, now)
            frame_of[content] = frame + 1
        elif own != frame:
            memory.leave_frame(m, page)
            memory.map_frame(m, page, frame)
        memory.plan_write(m, page, now)
    return int(pages.size)
