"""A password in a URI is used, and is neither shown nor written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simclr_ray.cli import console
from simclr_ray.config import uris
from simclr_ray.config.uris import (
    hide_passwords,
    recall,
    remember,
    remembered,
    without_passwords,
)
from simclr_ray.errors import DataError
from simclr_ray.storage import checkpoint
from simclr_ray.storage.filesystem import filesystem
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.tracking.store import params_of, store_uri, tags_of

SECRET = "p1anted-5ecret"
URIS = {
    f"s3://KEY:{SECRET}@bucket/a?region=x": "s3://KEY:***@bucket/a?region=x",
    f"http://me:{SECRET}@host:5000": "http://me:***@host:5000",
    f"postgresql+psycopg2://me:{SECRET}@host/db": "postgresql+psycopg2://me:***@host/db",
    f"postgresql://host/db?user=me&password={SECRET}&a=b": (
        "postgresql://host/db?user=me&password=***&a=b"
    ),
    f"abfs://account:{SECRET}@c/p": "abfs://account:***@c/p",
    f"abfs://c@account/p?client_id=a&client_secret={SECRET}": (
        "abfs://c@account/p?client_id=a&client_secret=***"
    ),
    f"postgresql://host/db?sslpassword={SECRET}": "postgresql://host/db?sslpassword=***",
    f"http://me:p@{SECRET}@host:5000": "http://me:***@host:5000",
    f"s3://AKIA:abc/{SECRET}@bucket/x": "s3://AKIA:***@bucket/x",
    f"s3://AKIA:12/{SECRET}@bucket/x": "s3://AKIA:***@bucket/x",
    f"http://me:a/{SECRET}/b@host": "http://me:***@host",
    f"s3://KEY:{SECRET}@bucket/a@2x.png": "s3://KEY:***@bucket/a@2x.png",
    f"https://{SECRET}@host/x@y": "https://***@host/x@y",
    f"https://{SECRET}:@host": "https://***@host",
    f"https://{SECRET}:x-oauth-basic@host": "https://***@host",
    f"https://b/x?X-Amz-Date=1&X-Amz-Signature={SECRET}&a=b": (
        "https://b/x?X-Amz-Date=1&X-Amz-Signature=***&a=b"
    ),
    f"https://b/x?X-Amz-Security-Token={SECRET}": "https://b/x?X-Amz-Security-Token=***",
    f"abfs://c@account/p?account_key={SECRET}": "abfs://c@account/p?account_key=***",
}


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uris, "_full", {})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize(("uri", "shown"), URIS.items())
def test_a_password_is_hidden_wherever_a_text_names_it(uri: str, shown: str) -> None:
    assert hide_passwords(uri) == hide_passwords(shown) == shown
    assert hide_passwords(f'no "{uri}", or <{uri}>') == f'no "{shown}", or <{shown}>'
    tree = {"a": [uri, 1, None, {"b": uri}], "c": (uri,)}
    assert without_passwords(tree) == {"a": [shown, 1, None, {"b": shown}], "c": (shown,)}


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a", "user@host:a/b", "a: b@c", "http://host:5000/x@y", "models:/a@b", "",
        "http://[::1]:5000/x@y", "abfs://c@account/p", "postgresql://me@host/db", "s3://b/a:b@2x.png",
        "http://host:5000: me@there", "file:///a:b/c@d", "http://host:/x@y", "https://host/?a=@b",
    ],
)  # fmt: skip
def test_other_text_stays(text: str) -> None:
    assert hide_passwords(text) == text


def test_what_is_shown_is_found_again_in_this_process_or_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, shown = next(iter(URIS.items()))
    assert recall(shown) == "s3://bucket/a?region=x"  # credentials of the environment hold
    assert recall("postgresql://host/db?password=***&a=b") == "postgresql://host/db?a=b"
    assert recall("postgresql://host/db?a=b&password=***") == "postgresql://host/db?a=b"
    assert recall("postgresql://host/db?password=***") == "postgresql://host/db"
    assert recall("https://***@host/a@b") == "https://host/a@b"
    for uri, shown in URIS.items():
        assert remember(uri) == uri
        assert recall(shown) == uri
        assert SECRET not in shown
    given = f"http://me:{SECRET}@host"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert store_uri("http://me:***@host") == given


def test_another_process_of_the_run_has_what_this_one_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uris, "_full", {})
    uri = "s3://KEY:S3CRET@bucket/photos"
    remember(uri)
    handed = remembered()
    monkeypatch.setattr(uris, "_full", {})  # as there, where a list alone names the bucket
    shown = hide_passwords(uri)
    assert recall(shown) == "s3://bucket/photos"
    for given in handed.values():
        remember(given)
    assert recall(shown) == uri


def test_no_file_of_a_run_holds_it_and_the_run_is_found_again(tmp_path: Path) -> None:
    folder = RunFolder.at(str(tmp_path / "run"))
    uri = f"http://me:{SECRET}@host:5000"
    RunRecord("id", uri, "f", "d").write(folder)
    folder.write_text("config.yaml", f"tracking:\n  uri: {uri}\n")
    assert SECRET not in "".join(p.read_text() for p in (tmp_path / "run").iterdir())
    assert RunRecord.read(folder).tracking_uri == uri == store_uri(uri)
    record = tmp_path / "record.json"
    checkpoint.sign(record, {"experiment": {"storage": f"s3://k:{SECRET}@b"}})
    assert json.loads(record.read_text())["experiment"] == {"storage": "s3://k:***@b"}


def test_neither_mlflow_nor_the_terminal_is_given_it(capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"s3://KEY:{SECRET}@bucket"
    assert params_of({"a": uri}) == tags_of({"a": uri}) == {"a": "s3://KEY:***@bucket"}
    console.say(uri)
    console.show_pairs({"a": uri})
    console.show_table("t", ["a"], [[uri]])
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err


@pytest.mark.parametrize(
    "uri",
    ["fsspec+memory://a", "github://a/b", "http://a/b.parquet", f"ftp://me:{SECRET}@h/a"],
)
def test_only_what_pyarrow_itself_opens_is_opened(uri: str) -> None:
    """By `fsspec+…` it imports whatever package is registered for a name."""
    with pytest.raises(DataError, match="cannot be opened: not one of") as caught:
        filesystem(uri)
    assert SECRET not in str(caught.value)


def test_an_error_of_the_file_system_does_not_show_it() -> None:
    with pytest.raises(DataError) as caught:
        filesystem(f"s3://KEY:{SECRET}@bucket:x/a b")
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
