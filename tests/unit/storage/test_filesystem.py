"""Addresses of what lies in a folder, wherever that is."""

from __future__ import annotations

import pytest

from simclr_ray.storage.filesystem import address_below


@pytest.mark.parametrize(
    ("folder", "below"),
    [
        ("/data/out/", "/data/out/a/b"),
        ("odd?name", "odd?name/a/b"),
        ("s3://b/out?region=eu", "s3://b/out/a/b?region=eu"),
    ],
)
def test_options_of_a_bucket_stay_last(folder: str, below: str) -> None:
    assert address_below(folder, "a/b") == below
