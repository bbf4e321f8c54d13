"""Which version of the protocol two processes speak."""

from __future__ import annotations

import pytest

from scheduler.errors import ProtocolError
from scheduler.handshake import agreed


@pytest.mark.parametrize(
    ("ours", "theirs", "spoken"),
    [((1, 2), (1, 2), 2), ((1, 2), (1, 1), 1), ((2, 3), (1, 2), 2), ((1, 2), (2, 9), 2)],
)
def test_the_newest_version_that_both_speak(ours, theirs, spoken):
    assert agreed(ours, theirs) == agreed(theirs, ours) == spoken


def test_releases_too_far_apart_are_told_to_go_step_by_step():
    with pytest.raises(ProtocolError, match=r"1 to 2 .* 3 to 4: upgrade the older one"):
        agreed((1, 2), (3, 4))
