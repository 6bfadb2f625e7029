"""agent.toml."""

from __future__ import annotations

import pytest

from edge_runtime.agent.config import link_settings, load_agent_config
from edge_runtime.errors import ConfigError

GOOD = """
device = "pi-7"
state_dir = "state"
[broker]
url = "mqtt://localhost:1883"
password_file = "secret"
ca = "/etc/ca.crt"
[[data]]
name = "digits"
format = "npz"
path = "digits.npz"
[limits]
worker_nice = 5
"""


def load(tmp_path, text):
    path = tmp_path / "agent.toml"
    path.write_text(text, encoding="utf-8")
    return load_agent_config(path)


def test_relative_paths_count_from_the_file(tmp_path):
    """Paths in the file are relative to its folder, absolute ones stay, and limits have defaults."""
    config = load(tmp_path, GOOD)
    assert config.state_dir == str(tmp_path / "state")
    assert config.broker.password_file == str(tmp_path / "secret")
    assert config.broker.ca == "/etc/ca.crt"
    assert config.data[0].path == str(tmp_path / "digits.npz")
    assert (config.limits.worker_nice, config.limits.worker_threads) == (5, 1)


def test_energy_has_defaults_and_paths_of_its_own(tmp_path):
    """Without the section the best sensor is looked for; files of the section count from the file's folder, too."""
    config = load(tmp_path, GOOD)
    assert (config.energy.sensor, config.energy.has_model, config.limits.job_joules) == ("auto", False, None)
    text = '[energy]\ncalibration = "modelled.json"\n[energy.plug]\nurl = "mqtt://10.0.0.2"\nkind = "shelly2"\n'
    text += 'topic = "shelly-1"\npassword_file = "plug.secret"\n[limits]\njob_joules = 100\n'
    config = load(tmp_path, GOOD.replace("[limits]\n", text))
    assert config.energy.calibration == str(tmp_path / "modelled.json")
    assert config.energy.plug.password_file == str(tmp_path / "plug.secret")
    assert (config.energy.plug.channel, config.energy.plug.ca, config.energy.has_model) == (0, None, True)
    assert config.limits.job_joules == 100.0


def test_limits_link_and_telemetry_have_defaults(tmp_path):
    """Without them nothing is forbidden, the link is looked at, and no file is read."""
    config = load(tmp_path, GOOD)
    assert (config.limits.hours, config.limits.only_when_charging, config.limits.battery_reserve_percent) == (
        *(None, False, None),
    )
    assert (config.link.metered, config.telemetry.file, config.heartbeat_interval_s) == ("auto", None, 50.0)
    text = '[link]\nmetered = true\n[telemetry]\nfile = "gauges.json"\n[energy]\nsensor = "none"\n[limits]\n'
    config = load(tmp_path, GOOD.replace("[limits]\n", text + 'hours = "22:00-06:00"\njoules_per_day = 500\n'))
    assert (config.link.metered, config.telemetry.file) == (True, str(tmp_path / "gauges.json"))


def test_password_is_read_anew_and_belongs_to_the_device(tmp_path):
    """The password file is read at every connection; without a user name the device's name is it."""
    settings = link_settings(load(tmp_path, GOOD))
    for secret in ("one", "two"):
        (tmp_path / "secret").write_text(secret + "\n")
        assert settings.password() == secret
    assert settings.username == settings.client_id == "pi-7"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'state_dir = "state"',
            'state_dir = "state"\nspeed = 3',
            "unknown key 'speed'; known are device, state_dir, broker",
        ),
        ('state_dir = "state"', 'state_dir = "state"\nworker_nice = 3', r"'worker_nice'; it belongs in \[limits\]"),
        ('name = "digits"', 'name = "digits"\npaht = 3', r"'paht' in table 1 of \[\[data\]\]; did you mean 'path'"),
        (
            "worker_nice = 5",
            "worker_nice = 5\nblob_gb = 1",
            r"unknown key 'blob_gb' in \[limits\]; did you mean 'blob_mb'\?",
        ),
        ("worker_nice = 5", 'worker_nice = "high"', r"limits\.worker_nice is text in quotes, but must be a whole"),
        ("worker_nice = 5", "worker_nice = 20", r"limits\.worker_nice must be a whole number <= 19"),
        ("worker_nice = 5", "blob_mb = 0", r"limits\.blob_mb must be a number > 0"),
        ("worker_nice = 5", "blob_mb = inf", r"limits\.blob_mb = inf"),
        ("worker_nice = 5", "max_temperature_c = nan", r"limits\.max_temperature_c = nan"),
        ("[limits]", "[energy]\nidle_watts = 2\n[limits]", r"idle_watts and energy\.busy_watts belong together"),
        (
            "[limits]",
            "[energy]\nidle_watts = 5\nbusy_watts = 4\n[limits]",
            r"busy_watts = 4 is not above energy\.idle_watts = 5",
        ),
        (
            "[limits]",
            '[energy]\nidle_watts = 2\nbusy_watts = 4\ncalibration = "m.json"\n[limits]',
            r"energy\.calibration brings its own watts",
        ),
        ("[limits]", '[energy]\nsensor = "modelled"\n[limits]', r"needs idle_watts and busy_watts, or calibration"),
        ("[limits]", '[energy]\nsensor = "plug"\n[limits]', r"needs \[energy\.plug\] with url, kind and topic"),
        ("[limits]", '[energy]\nsenser = "auto"\n[limits]', r"'senser' in \[energy\]; did you mean 'sensor'"),
        ("[limits]", '[energy]\nradio = "5g"\n[limits]', r"energy\.radio"),
        ("[limits]", "[energy]\njoules_per_mb_up = 2\n[limits]", "joules_per_mb_down belong together"),
        (
            "[limits]",
            '[energy]\nradio = "lte"\njoules_per_mb_up = 2\njoules_per_mb_down = 1\n[limits]',
            "say the same thing",
        ),
        ("[limits]", "[energy]\nidle_watts = 1\nbusy_watts = inf\n[limits]", r"energy\.busy_watts = inf"),
        ("[limits]", '[energy.plug]\nurl = "mqtt://a"\nkind = "kasa"\ntopic = "t"\n[limits]', r"energy\.plug\.kind"),
        ("[limits]", '[energy]\nsensor = "none"\n[limits]\njob_joules = 9', r"limits\.job_joules cannot be kept with"),
        ("worker_nice = 5", "joules_per_day = 0.5", r"agent\.toml: limits\.joules_per_day = 0\.5 is .*; set 1 or more"),
        (
            'state_dir = "state"',
            'state_dir = "state"\ntelemetry = { path = "gauges.json" }',
            r"unknown key 'path' in \[telemetry\]; did you mean 'file'\?",
        ),
        ('state_dir = "state"', 'state_dir = "state"\nlink = { metered = "no" }', "must be 'auto' or true or false"),
        (
            "worker_nice = 5",
            'hours = "22-6"',
            r'agent\.toml: limits\.hours = "22-6" is no list of hours; write "22:00-06:00, 12:00',
        ),
        ("worker_nice = 5", 'hours = "08:00-08:00"', r'"08:00-08:00" is no span of a day; write "00:00-24:00"'),
        ("worker_nice = 5", 'hours = "20:00-24:30"', r'"20:00-24:30" is no span of a day'),
        ("worker_nice = 5", "battery_reserve_percent = 101", r"battery_reserve_percent must be a number <= 100"),
        ("worker_nice = 5", "data_mb_per_month = 0", r"limits\.data_mb_per_month must be a number > 0"),
        ("worker_nice = 5", 'only_when_charging = "yes"', r"only_when_charging is text in quotes, but must be true"),
        (
            "[limits]",
            '[energy]\nsensor = "none"\n[limits]\njoules_per_day = 9',
            r"limits\.joules_per_day cannot be kept",
        ),
        ("[limits]", "[energy]\nbattery_wh = 0\n[limits]", r"energy\.battery_wh must be a number > 0"),
        ("[limits]", '[link]\nmetered = "maybe"\n[limits]', r"link\.metered"),
        ("[limits]", '[telemetry]\nfiles = "t.json"\n[limits]', r"'files' in \[telemetry\]; did you mean 'file'"),
        ("worker_nice = 5", "job_joules = 0", r"limits\.job_joules must be a number > 0"),
        ('device = "pi-7"', 'device = "pi 7"', "device name 'pi 7'"),
        ('device = "pi-7"', "", "device"),
        ('name = "digits"', 'name = "a/b"', r"data\[0\]\.name must be 1 to 64 letters, digits"),
        ("mqtt://localhost:1883", "mqtt://broker.example:1883", "unencrypted"),
        ("mqtt://localhost:1883", "http://localhost", "malformed"),
        ("[limits]", '[[data]]\nname = "digits"\nformat = "npz"\npath = "b.npz"\n[limits]', "names are unique"),
    ],
)
def test_wrong_configuration_is_refused_by_name(tmp_path, old, new, said):
    """Whatever is wrong in the file, the error names the file and the key or value."""
    assert old in GOOD
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, GOOD.replace(old, new))


def test_no_dataset_is_refused(tmp_path):
    """An agent without data has nothing to do."""
    with pytest.raises(ConfigError, match="name at least one dataset"):
        load(tmp_path, 'device = "a"\nstate_dir = "s"\ndata = []\n[broker]\nurl = "mqtt://localhost"\n')
