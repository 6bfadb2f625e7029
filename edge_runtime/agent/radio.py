"""The interface of the connection: whether it is metered, and joules of the radio, modelled from bytes.

No device measures the radio apart.

While data flows at ``r`` Mbit/s a radio draws ``alpha * r + beta`` mW, so a megabyte costs ``8 * (alpha + beta / r)``
mJ (Huang et al., "A close examination of performance and power characteristics of 4G LTE networks", MobiSys 2012, the
power model). The constants are of phones of that time, at the rates named here. What a modem draws after the last
byte (about 12 J in LTE for every transfer that stands alone) is not in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from edge_runtime.agent.energy_config import EnergyConfig

_MODEM_NAMES = ("wwan", "wwp", "rmnet", "ppp")
_TETHERS = ("rndis_host", "ipheth", "qmi_wwan", "cdc_mbim", "huawei_cdc_ncm", "sierra_net")  # phones and modems by USB


class Radio(NamedTuple):
    """What a link costs. ``joules_per_mb_*``: per 10^6 bytes; None: unknown. ``about`` says in words where from."""

    joules_per_mb_up: float | None
    joules_per_mb_down: float | None
    about: str

    def joules(self, sent_bytes: int, received_bytes: int) -> float | None:
        """Modelled joules of a transfer; None where a constant is unknown."""
        up, down = self.joules_per_mb_up, self.joules_per_mb_down
        return None if up is None or down is None else (sent_bytes * up + received_bytes * down) / 1e6


def _phone(name: str, *, up: float, down: float, base: float, rate: float) -> Radio:
    """``up`` and ``down`` in mW per Mbit/s, ``base`` in mW, ``rate`` in Mbit/s."""
    about = f"{name} of a phone at {rate:g} Mbit/s (Huang et al. 2012)"
    return Radio(0.008 * (up + base / rate), 0.008 * (down + base / rate), about)


RADIOS = {
    "wifi": _phone("wifi", up=283.17, down=137.01, base=132.86, rate=18.9),
    "lte": _phone("LTE", up=438.39, down=51.97, base=1288.04, rate=5.85),
    "3g": _phone("3G", up=868.98, down=122.12, base=817.88, rate=1.1),
    "ethernet": Radio(None, None, "ethernet: no constants are known; give joules_per_mb_up and joules_per_mb_down"),
}


def radio_of(config: EnergyConfig, local_host: str | None, root: Path) -> Radio:
    """The radio of a connection.

    Args:
        config: what it says goes before what is found.
        local_host: this end's address of the connection; None: there is none yet.
        root: where ``sys`` is looked for.
    """
    if config.joules_per_mb_up is not None or config.joules_per_mb_down is not None:
        return Radio(config.joules_per_mb_up, config.joules_per_mb_down, "constants of agent.toml")
    if config.radio is not None:
        return RADIOS[config.radio]
    name = None if local_host is None else _interface(local_host)
    if name is None:
        return Radio(None, None, "by the interface of the connection; or set energy.radio")
    return _of_interface(name, root / "sys/class/net" / name)


def metered_by(local_host: str | None, root: Path) -> bool | None:
    """Whether every byte over this connection is probably paid for, by its interface.

    Modems and phones on a cable are metered, other cables are not; a wireless LAN may be a phone's hot spot, so of it
    nothing is known.

    Args:
        local_host: this end's address of the connection; None: there is none yet.
        root: where ``sys`` is looked for.
    """
    name = None if local_host is None else _interface(local_host)
    return None if name is None else _is_metered(name, root / "sys/class/net" / name)


def _is_metered(name: str, folder: Path) -> bool | None:
    if name.startswith(_MODEM_NAMES) or "DEVTYPE=wwan" in _text(folder / "uevent") or _driver(folder) in _TETHERS:
        return True
    if (folder / "wireless").exists() or (folder / "phy80211").exists():
        return None
    return False if name == "lo" or (folder / "device").exists() else None


def _driver(folder: Path) -> str:
    """Of the device behind an interface; empty: it has none, as a tunnel."""
    try:
        return (folder / "device/driver").readlink().name
    except OSError:
        return ""


def _interface(local_host: str) -> str | None:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == local_host for entry in addresses):
            return str(name)
    return None


def _of_interface(name: str, folder: Path) -> Radio:
    if (folder / "wireless").exists() or (folder / "phy80211").exists():
        radio = RADIOS["wifi"]
        return radio._replace(about=f"{name}: {radio.about}")
    if name == "lo":
        return Radio(None, None, "lo: the broker is on this machine")
    if name.startswith(_MODEM_NAMES) or "DEVTYPE=wwan" in _text(folder / "uevent"):
        return Radio(None, None, f'{name} is a modem: set energy.radio to "lte" or "3g"')
    return Radio(None, None, f"{name}: {RADIOS['ethernet'].about}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
