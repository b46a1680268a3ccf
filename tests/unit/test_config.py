from __future__ import annotations

from pathlib import Path

import pytest

from agent.config import CERT_LIFE, default_address, load, parse_duration, parse_listen
from agent.errors import Invalid


def test_a_flag_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('name = "filed"\nport = 1\njoin = ["a", "b:1"]\nmdns = true\n')
    found = load({"port": 3}, {"VXMESH_NAME": "Envied", "VXMESH_PORT": "2"}, file)
    settings = found.settings
    assert (settings.name, settings.port, settings.join) == ("envied", 3, ("a", "b:1"))
    assert settings.mdns is True
    assert found.sources["port"] == "--port"
    assert found.sources["name"] == "VXMESH_NAME"
    assert found.sources["join"] == str(file)
    assert found.sources["data_port"] == "default"


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ({"port": 0}, {}, "setting port: is out of range"),
        ({"data_port": 53}, {}, "setting data_port: is 53"),
        ({"data_port": 52}, {}, "setting data_port: is 52"),
        ({}, {"VXMESH_PORT": "seven"}, "from VXMESH_PORT"),
        ({}, {"VXMESH_MDNS": "perhaps"}, "setting mdns: is malformed"),
        ({"advertise": "nowhere"}, {}, "address 'nowhere'"),
        ({"name": "a.b"}, {}, "is not a DNS label"),
        ({"run_dir": "run"}, {}, "is not absolute"),
        ({"metrics_listen": "9646"}, {}, "Write ADDRESS:PORT"),
        ({"metrics_listen": "::1:9646"}, {}, "Write ADDRESS:PORT"),
        ({"metrics_listen": "127.0.0.1:0"}, {}, "Write ADDRESS:PORT"),
        ({"path_interval": 0.0}, {}, "setting path_interval: is out of range"),
        ({"log_level": "loud"}, {}, "Use debug, info"),
    ],
)
def test_bad_settings_are_named(
    flags: dict[str, object], environment: dict[str, str], words: str
) -> None:
    with pytest.raises(Invalid) as caught:
        load(flags, environment)
    assert words in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="does not exist"):
        load({}, {}, tmp_path / "none")
    file = tmp_path / "a.toml"
    for text, words in (("nonsense", "cannot be read"), ("colour = 1", "setting colour")):
        file.write_text(text)
        with pytest.raises(Invalid, match=words):
            load({}, {}, file)


def test_the_default_address_is_an_address() -> None:
    try:
        assert default_address().count(".") == 3 or ":" in default_address()
    except Invalid as error:
        assert "no route leads outside" in str(error)


def test_where_metrics_are_served() -> None:
    assert parse_listen("127.0.0.1:9646", "metrics_listen") == ("127.0.0.1", 9646)
    assert parse_listen("[::1]:9646", "control_listen") == ("::1", 9646)
    listening = load({"metrics_listen": "[::]:1"}, {}).settings.metrics_listen
    assert listening == "[::]:1"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90d", 7_776_000), ("10s", 10), ("2h30m", 9000), ("1d", 86_400)]
)
def test_the_life_of_certificates_is_a_duration(text: str, seconds: float) -> None:
    assert load({"cert_life": text}, {}).settings.cert_life == text
    assert parse_duration("cert_life", text, CERT_LIFE) == seconds


@pytest.mark.parametrize("text", ["", "9s", "90", "1w", "-1d", "1.5h", "99999d", "d", "1d 2h"])
def test_one_that_is_none_or_is_of_no_use_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="cert_life"):
        load({"cert_life": text}, {})


def test_a_token_and_a_file_with_one_are_not_given_both() -> None:
    with pytest.raises(Invalid, match="token_file"):
        load({"token": "a", "token_file": "/b"}, {})
