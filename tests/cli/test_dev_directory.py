"""The directory of `broker dev`, whatever the machine makes of new files."""

import os

import pytest

from broker.cli.dev import load_dev


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_a_development_directory_is_safe_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        assert load_dev(tmp_path / "dev", 8080).catalogue.policies
        assert load_dev(tmp_path / "dev", 8080)
    finally:
        os.umask(before)
    assert not any(file.stat().st_mode & 0o022 for file in (tmp_path / "dev").rglob("*.*") if file.is_file())
