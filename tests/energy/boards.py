"""Trees of ``/sys`` and ``/proc`` as real boards show them, made by functions; values may be written anew afterwards.

Every function takes an empty folder, fills it as the root of one machine, and returns it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SHARED_BUS = "sys/devices/platform/bus@0/c240000.i2c/i2c-1"


def write(path: Path, value: object) -> Path:
    """Writes a value as the kernel shows it, with a newline, into the file itself (open descriptors see it)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n", encoding="utf-8")
    return path


def link(path: Path, target: Path) -> None:
    """Makes a relative link as sysfs does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


def vanish(folder: Path) -> None:
    """Takes a device away: descriptors that are open read nothing from now on, and its files are gone."""
    real = folder.resolve()
    for path in real.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.write_bytes(b"")
    shutil.rmtree(real)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """This thread heeds the modes of files, as it does not where tests run as root (Linux, capabilities 1 and 2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()  # twice effective, permitted, inheritable
    assert libc.capget(header, data) == 0
    before = data[0]
    data[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = before
        assert libc.capset(header, data) == 0


def ina3221(
    root: Path, address: str, hwmon: int, channels: Sequence[tuple[str, int, int] | None], *, driver: bool = True
) -> Path:
    """A power monitor in hwmon: label, mV and mA of up to three channels, with all that stands beside them."""
    device = root / SHARED_BUS / address
    chip = device / "hwmon" / f"hwmon{hwmon}"
    write(chip / "name", "ina3221")
    for number, channel in enumerate(channels, start=1):
        if channel is None:
            continue
        label, millivolts, milliamperes = channel
        write(chip / f"in{number}_label", label)
        write(chip / f"in{number}_enable", 1)
        write(chip / f"in{number}_input", millivolts)
        write(chip / f"curr{number}_input", milliamperes)
        write(chip / f"curr{number}_crit_alarm", 0)
        write(chip / f"shunt{number}_resistor", 2000)
    for number in (4, 5, 6):
        write(chip / f"in{number}_input", 10)
    write(chip / "in7_label", "sum of shunt voltages")
    write(chip / "in7_input", 30)
    write(chip / "curr4_input", 99999)
    write(device / "name", "ina3221")
    link(root / "sys/bus/i2c/devices" / address, device)
    link(root / f"sys/class/hwmon/hwmon{hwmon}", chip)
    if driver:
        link(root / "sys/bus/i2c/drivers/ina3221" / address, device)
    return chip


def jetson_extras(root: Path, model: str) -> Path:
    """What all Jetsons have beside their power monitors."""
    write(root / "proc/device-tree/model", model + "\0")
    oc = root / "sys/devices/platform/soctherm-oc-event/hwmon/hwmon9"
    write(oc / "name", "soctherm_oc")
    for number, count in ((1, 0), (2, 0), (3, 0)):
        write(oc / f"oc{number}_event_cnt", count)
        write(oc / f"oc{number}_throt_en", 1)
    link(root / "sys/class/hwmon/hwmon9", oc)
    thermal(root, [("cpu-thermal", 50125), ("gpu-thermal", 50562), ("tj-thermal", 51000)])
    cooling(root, [("pwm-fan", 1), ("cpufreq-cpu0", 0), ("devfreq-17000000.gpu", 0)])
    for policy, kilohertz in (("policy0", 1344000), ("policy4", 1344000)):
        write(root / f"sys/devices/system/cpu/cpufreq/{policy}/scaling_cur_freq", kilohertz)
        write(root / f"sys/devices/system/cpu/cpufreq/{policy}/scaling_governor", "schedutil")
    write(root / "sys/class/devfreq/17000000.gpu/cur_freq", 305898438)
    write(root / "sys/class/devfreq/15340000.vic/cur_freq", 115200000)
    write(
        root / "etc/nvpmodel.conf",
        "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=7W >\n< PM_CONFIG DEFAULT=0 >",
    )
    write(root / "var/lib/nvpmodel/status", "pmode:0000")
    return root


def orin_nano(root: Path) -> Path:
    """Jetson Orin Nano, JetPack 6: 9.25 W at the input."""
    ina3221(root, "1-0040", 1, [("VDD_IN", 4984, 1856), ("VDD_CPU_GPU_CV", 4984, 248), ("VDD_SOC", 4976, 480)])
    return jetson_extras(root, "NVIDIA Jetson Orin Nano Developer Kit")


def agx_orin(root: Path) -> Path:
    """Jetson AGX Orin: two chips, four rails, no total."""
    ina3221(root, "1-0040", 3, [("VDD_GPU_SOC", 8430, 617), ("VDD_CPU_CV", 7800, 343), ("VIN_SYS_5V0", 4968, 953)])
    ina3221(root, "1-0041", 4, [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 4800, 341), ("NC", 0, 0)])
    return jetson_extras(root, "NVIDIA Jetson AGX Orin Developer Kit")


def agx_xavier(root: Path) -> Path:
    """Jetson AGX Xavier with JetPack 5: six rails on two chips, no total."""
    ina3221(root, "1-0040", 2, [("GPU", 19128, 80), ("CPU", 19128, 160), ("SOC", 19112, 120)])
    ina3221(root, "1-0041", 3, [("CV", 19128, 0), ("VDDRQ", 19128, 40), ("SYS5V", 5008, 400)])
    return jetson_extras(root, "NVIDIA Jetson AGX Xavier")


def xavier_nx(root: Path) -> Path:
    """Jetson Xavier NX with JetPack 5."""
    ina3221(root, "7-0040", 5, [("VDD_IN", 5080, 768), ("VDD_CPU_GPU_CV", 5080, 262), ("VDD_SOC", 5080, 196)])
    return jetson_extras(root, "NVIDIA Jetson Xavier NX")


def thor(root: Path) -> Path:
    """Jetson AGX Thor: an INA238 at the board's input with 41.5 W, and an INA3221 for rails of the module."""
    device = root / "sys/devices/platform/bus@0/810c680000.i2c/i2c-2/2-0044"
    chip = device / "hwmon/hwmon2"
    write(chip / "name", "ina238")
    write(chip / "in1_label", "VIN")
    write(chip / "in0_input", 20)
    write(chip / "in1_input", 20020)
    write(chip / "curr1_input", 2073)
    write(chip / "power1_input", 41_500_000)
    link(root / "sys/bus/i2c/drivers/ina238/2-0044", device)
    link(root / "sys/class/hwmon/hwmon2", chip)
    ina3221(root, "1-0040", 5, [("VDD_GPU", 9000, 900), ("VDD_CPU_SOC_MSS", 9000, 1400), ("VIN_SYS_5V0", 5000, 1200)])
    return jetson_extras(root, "NVIDIA Jetson AGX Thor Developer Kit")


def iio_chip(root: Path, address: str, number: int, rails: Sequence[tuple[str, int, int]]) -> Path:
    """A power monitor as JetPack 4 shows it: name, mV and mA of each rail, and their product in mW."""
    device = root / "sys/devices/7000c400.i2c/i2c-6" / address
    chip = device / f"iio:device{number}"
    write(chip / "name", "ina3221x")
    for index, (name, millivolts, milliamperes) in enumerate(rails):
        write(chip / f"rail_name_{index}", name)
        write(chip / f"in_voltage{index}_input", millivolts)
        write(chip / f"in_current{index}_input", milliamperes)
        write(chip / f"in_power{index}_input", millivolts * milliamperes // 1000)
    link(root / "sys/bus/i2c/drivers/ina3221x" / address, device)
    link(root / f"sys/bus/iio/devices/iio:device{number}", chip)
    return chip


def nano(root: Path) -> Path:
    """Jetson Nano with JetPack 4: 1.63 W at its input."""
    iio_chip(root, "6-0040", 0, [("POM_5V_IN", 5088, 320), ("POM_5V_GPU", 5088, 0), ("POM_5V_CPU", 5088, 80)])
    write(root / "proc/device-tree/model", "NVIDIA Jetson Nano Developer Kit\0")
    return root


def tx2(root: Path) -> Path:
    """Jetson TX2 with JetPack 4: the total is on the second of the module's chips."""
    iio_chip(root, "0-0040", 0, [("VDD_SYS_GPU", 19152, 8), ("VDD_SYS_SOC", 19152, 24), ("VDD_4V0_WIFI", 4808, 8)])
    iio_chip(root, "0-0041", 1, [("VDD_IN", 19128, 160), ("VDD_SYS_CPU", 19136, 16), ("VDD_SYS_DDR", 4784, 72)])
    write(root / "proc/device-tree/model", "quill\0")
    return root


def pi5(root: Path) -> Path:
    """Raspberry Pi 5; what its firmware answers is in :func:`pmic_answer` and :func:`vcgencmd`."""
    write(root / "proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    thermal(root, [("cpu-thermal", 48300)])
    cooling(root, [("pwm-fan", 2)])
    write(root / "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq", 2400000)
    write(root / "sys/devices/system/cpu/cpufreq/policy0/scaling_governor", "ondemand")
    volt = root / "sys/class/hwmon/hwmon2"
    write(volt / "name", "rpi_volt")
    write(volt / "in0_lcrit_alarm", 0)
    return root


PMIC_RAILS = {  # amperes, volts, number of the current, number of the voltage: 4.93 W in all
    "3V7_WL_SW": (0.0, 3.7, 0, 8),
    "3V3_SYS": (0.1, 3.3, 1, 9),
    "1V8_SYS": (0.2, 1.8, 2, 10),
    "DDR_VDD2": (0.1, 1.1, 3, 11),
    "DDR_VDDQ": (0.0, 0.6, 4, 12),
    "1V1_SYS": (0.2, 1.1, 5, 13),
    "0V8_SW": (0.4, 0.8, 6, 14),
    "VDD_CORE": (4.0, 0.89, 7, 15),
    "HDMI": (0.006, 5.0, 22, 23),
}


def pmic_answer(rails: dict[str, tuple[float, float, int, int]] | None = None) -> str:
    """What the firmware prints: currents first, then voltages, two of them without a current."""
    rails = rails or PMIC_RAILS
    lines = [f"{name + '_A':>13} current({at})={amperes:.8f}A" for name, (amperes, _, at, _) in rails.items()]
    lines += [f"{name + '_V':>13} volt({at})={volts:.8f}V" for name, (_, volts, _, at) in rails.items()]
    return "\n".join([*lines, "      EXT5V_V volt(24)=5.10000000V", "       BATT_V volt(25)=3.00000000V", ""])


def vcgencmd(folder: Path, answers: dict[str, str], *, code: int = 0, complaint: str = "") -> Path:
    """A program of that name in ``folder``: prints the answer to its first argument, or complains and exits."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "vcgencmd"
    program.write_text(
        f"#!{sys.executable} -S\nimport sys\n"
        f"sys.stderr.write({complaint!r})\nsys.stdout.write({answers!r}.get(sys.argv[1], ''))\nsys.exit({code})\n",
        encoding="utf-8",
    )
    program.chmod(0o755)
    return program


def rapl_zone(folder: Path, name: str, microjoules: int, largest: int = 262_143_328_850) -> Path:
    """One counter of the powercap tree."""
    write(folder / "name", name)
    write(folder / "energy_uj", microjoules)
    write(folder / "max_energy_range_uj", largest)
    return folder


def x86_intel(root: Path, *, sockets: int = 1, psys: bool = True, dram: bool = True) -> Path:
    """Intel with RAPL: packages with core, uncore and dram, the platform, and the tree that shows packages twice."""
    real = root / "sys/devices/virtual/powercap/intel-rapl"
    tree = root / "sys/class/powercap"
    for socket in range(sockets):
        package = rapl_zone(real / f"intel-rapl:{socket}", f"package-{socket}", 1_000_000_000 + socket)
        parts = {"core": 600_000_000, "uncore": 50_000_000, **({"dram": 200_000_000} if dram else {})}
        for index, (name, microjoules) in enumerate(parts.items()):
            rapl_zone(package / f"{package.name}:{index}", name, microjoules, 65_712_999_613)
            link(tree / f"{package.name}:{index}", package / f"{package.name}:{index}")
        link(tree / package.name, package)
    if psys:
        platform = rapl_zone(real / f"intel-rapl:{sockets}", "psys", 5_000_000_000)
        link(tree / platform.name, platform)
    mmio = rapl_zone(root / "sys/devices/virtual/powercap/intel-rapl-mmio/intel-rapl-mmio:0", "package-0", 999)
    link(tree / mmio.name, mmio)
    write(root / "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", 3)
    write(root / "sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count", 3)
    thermal(root, [("acpitz", 27800), ("x86_pkg_temp", 61000)])
    cooling(root, [("Processor", 0), ("TCC Offset", 12), ("intel_powerclamp", -1)])
    return root


def x86_amd(root: Path) -> Path:
    """AMD: the same tree, one package with its cores; temperature only in hwmon."""
    package = rapl_zone(root / "sys/class/powercap/intel-rapl:0", "package-0", 70_000_000, 65_532_610_987)
    rapl_zone(package / "intel-rapl:0:0", "core", 9_000_000, 65_532_610_987)
    write(root / "sys/class/hwmon/hwmon3/name", "k10temp")
    write(root / "sys/class/hwmon/hwmon3/temp1_input", 45250)
    return root


def battery(root: Path, fields: dict[str, object], name: str = "BAT0") -> Path:
    """One power supply; its file ``uevent`` is returned. See :data:`LAPTOP`, :data:`LAPTOP_CURRENT`, :data:`PHONE`."""
    return battery_fields(root / "sys/class/power_supply" / name / "uevent", {"NAME": name, **fields})


def battery_fields(uevent: Path, fields: dict[str, object]) -> Path:
    """Writes what a driver says about its battery."""
    return write(uevent, "\n".join(f"POWER_SUPPLY_{key}={value}" for key, value in fields.items()))


LAPTOP: dict[str, object] = {  # microwatts
    "TYPE": "Battery",
    "STATUS": "Discharging",
    "PRESENT": 1,
    "VOLTAGE_NOW": 11_206_000,
    "POWER_NOW": 19_195_000,
    "ENERGY_FULL": 42_650_000,
    "ENERGY_NOW": 32_940_000,
}
LAPTOP_CURRENT: dict[str, object] = {  # microamperes and microvolts, and a power that is always 0
    "TYPE": "Battery",
    "STATUS": "Discharging",
    "VOLTAGE_NOW": 14_888_000,
    "CURRENT_NOW": 1_000_000,
    "POWER_NOW": 0,
    "ENERGY_FULL": 50_990_000,
    "ENERGY_NOW": 9_430_000,
}
PHONE: dict[str, object] = {  # milliamperes and milliampere-hours beside microvolts; negative while discharging
    "TYPE": "Battery",
    "STATUS": "Discharging",
    "VOLTAGE_NOW": 4_000_000,
    "CURRENT_NOW": -350,
    "CHARGE_FULL": 5000,
    "CHARGE_NOW": 4000,
}


def thermal(root: Path, zones: Sequence[tuple[str, int]]) -> None:
    """Thermal zones with type and thousandths of a degree."""
    for number, (kind, value) in enumerate(zones):
        write(root / f"sys/class/thermal/thermal_zone{number}/type", kind)
        write(root / f"sys/class/thermal/thermal_zone{number}/temp", value)


def cooling(root: Path, devices: Sequence[tuple[str, int]]) -> None:
    """Cooling devices with type and step."""
    for number, (kind, step) in enumerate(devices):
        write(root / f"sys/class/thermal/cooling_device{number}/type", kind)
        write(root / f"sys/class/thermal/cooling_device{number}/cur_state", step)
