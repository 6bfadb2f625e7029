"""Joules of the radio: constants of the literature, and which link is which."""

from __future__ import annotations

import pytest

from edge_runtime.agent.energy_config import EnergyConfig
from edge_runtime.agent.radio import RADIOS, _is_metered, _of_interface, metered_by, radio_of

LOOPBACK = "127.0.0.1"


@pytest.mark.parametrize(("name", "up"), [("lte", 5.27), ("wifi", 2.32), ("3g", 12.9)])
def test_a_megabyte_costs_what_the_paper_says(name, up):
    """Joules per megabyte sent at the stated rate; receiving costs less; the words name the source."""
    radio = RADIOS[name]
    assert radio.joules_per_mb_up == pytest.approx(up, rel=0.005)
    assert radio.joules_per_mb_down < radio.joules_per_mb_up
    assert "Huang et al. 2012" in radio.about
    expected = 2 * radio.joules_per_mb_up + 3 * radio.joules_per_mb_down
    assert radio.joules(2_000_000, 3_000_000) == pytest.approx(expected)


def test_ethernet_is_unknown_unless_given(tmp_path):
    """No constant is made up; one's own count."""
    assert radio_of(EnergyConfig(radio="ethernet"), None, tmp_path).joules(1, 1) is None
    own = radio_of(EnergyConfig(joules_per_mb_up=0.5, joules_per_mb_down=0.25), LOOPBACK, tmp_path)
    assert own.joules(1_000_000, 2_000_000) == 1.0


@pytest.mark.parametrize(
    ("name", "files", "joules", "said"),
    [
        ("wlan0", ["wireless/status"], RADIOS["wifi"].joules_per_mb_up, "wlan0: wifi of a phone"),
        ("wlp2s0", ["phy80211/name"], RADIOS["wifi"].joules_per_mb_up, "wlp2s0: wifi"),
        ("wwan0", [], None, 'wwan0 is a modem: set energy.radio to "lte" or "3g"'),
        ("usb0", ["uevent"], None, "usb0 is a modem"),
        ("eth0", [], None, "eth0: ethernet: no constants are known"),
        ("lo", [], None, "lo: the broker is on this machine"),
    ],
)
def test_the_interface_tells_the_radio(tmp_path, name, files, joules, said):
    """Wireless LAN is known by its files; a modem may be one or the other; for others nothing is known."""
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("DEVTYPE=wwan\nINTERFACE=usb0\n")
    radio = _of_interface(name, tmp_path)
    assert radio.joules_per_mb_up == joules
    assert said in radio.about


def test_the_interface_is_that_of_the_connection(tmp_path):
    """Found by this end's address; without a connection, or for an address of nobody, it is unknown."""
    assert radio_of(EnergyConfig(), LOOPBACK, tmp_path).about.startswith("lo:")
    for host in (None, "203.0.113.7"):
        assert radio_of(EnergyConfig(), host, tmp_path).joules(1, 1) is None


@pytest.mark.parametrize(
    ("name", "driver", "files", "metered"),
    [
        ("wwan0", "", [], True),
        ("ppp0", "", [], True),
        ("usb0", "rndis_host", [], True),
        ("enxa2b1", "ipheth", [], True),
        ("wlan0", "brcmfmac", ["wireless/status"], None),
        ("eth0", "bcmgenet", [], False),
        ("lo", "", [], False),
        ("wg0", "", [], None),
    ],
)
def test_the_interface_tells_whether_bytes_are_paid_for(tmp_path, name, driver, files, metered):
    """Modems and phones are metered, other cables are not; of a wireless LAN and a tunnel nothing is known."""
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    if driver:
        (tmp_path / "drivers" / driver).mkdir(parents=True)
        (tmp_path / "device").mkdir()
        (tmp_path / "device/driver").symlink_to(tmp_path / "drivers" / driver)
    assert _is_metered(name, tmp_path) is metered


def test_without_a_connection_it_is_not_known_whether_it_is_metered(tmp_path):
    """Nor for an address of nobody; on loopback it is."""
    assert metered_by(LOOPBACK, tmp_path) is False
    assert metered_by(None, tmp_path) is metered_by("203.0.113.7", tmp_path) is None
