"""Settings: flags > environment > file > defaults, and a bad value stops the start with its name and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from engram_service.settings import SettingError, read_settings


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
        ({"tick_rows_max": "many"}, {}, "--tick-rows-max"),
        ({}, {"ENGRAM_TICK_ROWS_MAX": "0"}, "at least 1"),
        ({"drain_timeout_s": "-1"}, {}, "negative"),
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
