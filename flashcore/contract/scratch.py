"""Scratch of the kernels that plan and lay out: which line of which matrix holds what.

Scratch is a few int32 matrices, one line for each array: `Entries`, `Segments`, `Groups`, `Rows`
and `Sort` name those of the planner, `PagerRanges` and `PagerTiles` the pager's. Nothing in them
outlives an update but what is said to.

There may be millions of entries (a page of a sequence each) and few segments, so entries have few
lines: 28 bytes with those of the plan, where a segment has 220.
"""

from __future__ import annotations

SCAN_THREADS = 1024  # of CTAs that scan: one element a thread
UNUSED = 2**31 - 1  # owner of a page that no entry has claimed


class Slots:
    """Columns of the table of pages: (pages, 4), so that a slot is one 16-byte load.

    Between updates every slot is (UNUSED, 0, 0, 0): who claims a page puts that back.
    """

    FIRST = 0  # smallest entry that uses the page
    USES = 1
    PARTIAL_TOKENS = 2  # token counts of the uses that do not fill the page, added up
    LONGEST = 3  # most tokens of any use
    LINES = 4


class Entries:
    """Per entry of the layout."""

    ROW = 0
    OWNER = 1  # -1: its sequence takes no part
    PREVIOUS = 2  # owner of the entry before it in its row, -1: it is the first
    GROUP = 2  # at the owner that begins a group, once PREVIOUS is read there: its number
    BROKEN = 3  # at an owner: not every use of its page goes on to the owner's next page
    START = 4  # tokens of its sequence before it
    LINES = 5
    DIFFERS = 5  # at a chunk's first entry: another page than its owner's, so it owns itself
    CHUNK_USES = 6  # at the first entry of a chunk that owns itself
    LINES_OF_CHUNKS = 7


class Segments:
    """Per segment; the lines from KEPT_ROW on per segment that folding leaves."""

    ENTRY = 0
    ROW = 1
    OWNER = 2  # entry
    GROUP = 3
    KEPT_ROW = 4
    KEPT_GROUP = 5
    KEPT_START = 6  # tokens of the row before it
    SPLITS_BEFORE = 7  # splits of all segments before it
    Q_BEGIN = 8  # first gathered token of its queries
    MEMBER_BEGIN = 9  # per member, in the order of groups: the same
    LINES = 10


class Groups:
    """Per group as found; MERGED per group that folding leaves."""

    ENTRIES = 0
    TOKENS = 1
    MEMBERS = 2
    QUERIES = 3
    LOW = 4  # smallest and largest group before it in a member; -1: it comes first
    HIGH = 5
    PARENT = 6
    CHILDREN = 7
    ENDS = 8  # a member ends with it
    STRAYS = 9  # a following group is not its child
    STATE = 10
    EXTRA_ENTRIES = 11
    EXTRA_TOKENS = 12
    NUMBER = 13  # among the groups that stay, -1 for a folded one
    MERGED = 14  # a member's row has other segments
    CHILD_BLOCKS = 15  # row blocks of all children
    LINES = 16
    ZEROED = (
        *(MEMBERS, QUERIES, CHILDREN, CHILD_BLOCKS, ENDS, STRAYS),
        *(EXTRA_ENTRIES, EXTRA_TOKENS, MERGED),
    )


class State:
    """Values of Groups.STATE."""

    KEPT = 0
    FOLDED = 1
    UNDECIDED = 2
    WORTH = 3  # kept, though it could be folded


class Rows:
    """Per sequence. PAGE_FAULT is zero between updates."""

    FAULTS = 0
    PAGE_FAULT = 1
    FIRST_SEGMENT = 2
    END_SEGMENT = 3
    LIST_LENGTH = 4  # elements of the merge list of each of its query tokens
    MERGE_BEGIN = 5
    LINES = 6


class Sort:
    """Lines of two buffers of (key, value) that take turns: key and value of buffer b are lines
    2 b and 2 b + 1. With classes of work items also where each begins."""

    KEY = 0
    VALUE = 1
    LINES = 4
    ITEM_BEGIN = 4
    LINES_OF_CLASSES = 5


class Tiles:
    """Per CTA of the segment scan, int64: its count below 2**32, above it the update's stamp, which
    tells it from that of the last update; one word, so that nothing need be ordered."""

    SEGMENTS = 0
    GROUPS = 1
    CUT = 2  # no line of CTAs but of these places
    LINES = 3

    READY = 0  # the stamp, when the groups are cut
    DONE = 1  # CTAs that have numbered their segments, zero between updates
    STAMP = 2  # updates finished, of every planner that has this scratch


class PagerRanges:
    """Scratch per sequence of a token map: its page changes, the first and the one after the last.

    A page change is a token that lies in another page than the token before it.
    """

    FIRST_CHANGE = 0
    END_CHANGE = 1
    LINES = 2


class PagerTiles:
    """Per CTA of the scans, as `Tiles`."""

    CHANGES = 0
    PIECES = 1
    STAGED = 2
    LINES = 3


FREE = 2**63 - 1
"""Slot of a page that no entry has claimed yet."""
