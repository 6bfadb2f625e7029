"""Topics: who writes what."""

from __future__ import annotations

import pytest

from edge_runtime import topics
from edge_runtime.errors import ConfigError


def test_topics_of_a_device_parse_back():
    """What a device writes can be told apart by device and leaf."""
    assert topics.parse_from_device(topics.from_device("pi-7", "chunk")) == ("pi-7", "chunk")


@pytest.mark.parametrize("topic", ["fl/v1/c/pi/message", "fl/v2/d/pi/state", "fl/v1/d/pi", "fl/v1/d/pi/a/b", ""])
def test_other_topics_are_nobodys(topic):
    """A topic that no device writes is not taken for one."""
    assert topics.parse_from_device(topic) is None


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "-a", "ä", "a" * 65, "a\n"])
def test_unusable_names_are_refused(name):
    """A name that would change the meaning of a topic is refused, and the error shows it."""
    with pytest.raises(ConfigError, match="device name"):
        topics.check_name("device", name)


def test_usable_names_pass():
    """Letters, digits, underscore, dot and hyphen make a name."""
    assert topics.check_name("run", "A_1.b-2") == "A_1.b-2"


def test_the_three_roots_do_not_overlap():
    """Device, coordinator and broadcast topics lie under different roots, as the broker's patterns expect."""
    assert topics.from_device("x", "message").startswith("fl/v1/d/x/")
    assert topics.to_device("x", "message").startswith("fl/v1/c/x/")
    assert topics.blob("ab").startswith("fl/v1/b/")
    assert topics.COORDINATOR.startswith("fl/v1/b/")
