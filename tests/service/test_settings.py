"""Settings: flags > environment > file > defaults, and a bad value stops the start with its name and why."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest

from engram_service.settings import SettingError, Settings, read_settings


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    config = tmp_path / "engram.toml"
    config.write_text('listen = "127.0.0.1:1"\nhttp = "127.0.0.1:1"\ninterval_ms = 7\nshipped_models = false\n')
    found = read_settings(
        {"config": str(config), "listen": "127.0.0.1:3"}, {"ENGRAM_LISTEN": "127.0.0.1:2", "ENGRAM_HTTP": "127.0.0.1:2"}
    )
    assert (found.listen, found.http, found.interval_ms) == ("127.0.0.1:3", "127.0.0.1:2", 7)
    assert found.shipped_models is False
    assert found.durability == "step"


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ({"listen": "nowhere"}, {}, "listen"),
        ({"listen": "127.0.0.1:\u00b2"}, {}, "listen"),
        ({"http": "127.0.0.1:" + "1" * 5000}, {}, "http"),
        ({"http": "[::1:9464"}, {}, "http"),
        ({"http": "[]:9464"}, {}, "http"),
        ({"http": "somebody@here:9464"}, {}, "http"),
        ({"http_connections_max": "0"}, {}, "http_connections_max"),
        ({}, {"ENGRAM_HTTP": "127.0.0.1:99999"}, "http"),
        ({"durability": "sometimes"}, {}, "step, interval"),
        ({"batch_rows_max": "many"}, {}, "--batch-rows-max"),
        ({}, {"ENGRAM_BATCH_ROWS_MAX": "0"}, "at least 1"),
        ({"drain_timeout_s": "-1"}, {}, "negative"),
        ({"sessions_max": "9" * 400}, {}, "sessions_max is too large"),
        ({"sessions_max": "9" * 5000}, {}, "not a whole number"),
        ({}, {"ENGRAM_STEP_TIMEOUT_S": "1e300"}, "step_timeout_s is too large"),
        ({"frame_bytes_max": str(1 << 30)}, {}, "frame_bytes_max is too large"),
        ({"device": "gpu"}, {}, "cuda:N"),
        ({"redis_ack": "replicated"}, {}, "give a redis_url"),
        ({"models": "/does/not/exist"}, {}, "no such directory"),
        ({"config": "/does/not/exist.toml"}, {}, "No such file"),
        ({}, {"ENGRAM_SHIPPED_MODELS": "perhaps"}, "true or false"),
    ],
)
def test_bad_values_are_named(flags: dict[str, str], environment: dict[str, str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        read_settings(flags, environment)


def test_an_unknown_name_in_the_file_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "engram.toml"
    config.write_text("lissten = 1\n")
    with pytest.raises(SettingError, match="lissten"):
        read_settings({"config": str(config)}, {})
    config.write_text("= nonsense")
    with pytest.raises(SettingError, match="not toml"):
        read_settings({"config": str(config)}, {})


NUMBERS = [item.name for item in fields(Settings) if type(item.default) in (int, float)]


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_are_finite_from_every_source(number: str, tmp_path: Path) -> None:
    config = tmp_path / "engram.toml"
    for name in NUMBERS:
        config.write_text(f"{name} = {number}\n")
        for flags, environment in (
            ({name: number}, {}),
            ({}, {"ENGRAM_" + name.upper(): number}),
            ({"config": str(config)}, {}),
        ):
            with pytest.raises(SettingError, match=f"^{name} = "):
                read_settings(flags, environment)


def test_a_file_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    config = tmp_path / "engram.toml"
    os.mkfifo(config)
    with pytest.raises(SettingError, match="a named pipe, not a regular file"):
        read_settings({"config": str(config)}, {})
    config.unlink()
    for text, words in (
        ("sessions_max = " + "9" * 5000, "digits"),
        ("sessions_max = 0x" + "f" * 5000, "more than 64 bits"),
        ("x = " + "[" * 50_000, "nested too deep"),
        ("listen = []", "not a string"),
        ("#" * (2 << 20), "at most"),
    ):
        config.write_text(text)
        with pytest.raises(SettingError, match=words):
            read_settings({"config": str(config)}, {})
    config.write_bytes(b"listen = '\xff'")
    with pytest.raises(SettingError, match="not UTF-8"):
        read_settings({"config": str(config)}, {})
