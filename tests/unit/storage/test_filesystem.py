"""Addresses of what lies in a folder, wherever that is."""

from __future__ import annotations

import pytest

from simclr_ray.storage.filesystem import address_above, address_below, split_address


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


@pytest.mark.parametrize(
    ("address", "folder", "name"),
    [
        ("/data/runs/a-1/", "/data/runs", "a-1"),
        ("/a-1", "/", "a-1"),
        ("runs/odd?name/a-1", "runs/odd?name", "a-1"),
        ("a-1", "", "a-1"),
        ("file:///a-1", "file:///", "a-1"),
        ("s3://bucket", "s3://", "bucket"),
        ("s3://bucket/a-1", "s3://bucket", "a-1"),
        (
            "s3://b/runs/a-1/?endpoint_override=http://h:9000&scheme=http",
            "s3://b/runs?endpoint_override=http://h:9000&scheme=http", "a-1",
        ),
    ],
)  # fmt: skip
def test_what_lies_in_a_folder_is_named_from_there_again(
    address: str, folder: str, name: str
) -> None:
    assert split_address(address) == (folder, name)
    assert address_below(folder, name) == address.replace("/?", "?").rstrip("/")
    assert address_above(address_below(address, "b/c"), 3) == folder
