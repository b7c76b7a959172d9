"""A local Ray has a token of its own; one that the user has chosen is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simclr_ray.distributed import ray_token
from simclr_ray.distributed.ray_token import MODE, PATH, TOKEN


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in (MODE, TOKEN, PATH):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray_token, "_created", {})
    # Ray in this process may be connected to the cluster that tests share
    monkeypatch.setattr(ray_token, "_read_again", lambda: None)


def shown() -> dict[str, str]:
    return {key: os.environ[key] for key in (MODE, TOKEN, PATH) if key in os.environ}


def test_each_local_cluster_has_a_new_token_and_no_file(tmp_path: Path) -> None:
    ray_token.create()
    first = shown()
    assert set(first) == {MODE, TOKEN}
    assert first[MODE] == "token"
    assert len(first[TOKEN]) == 64
    ray_token.create()
    assert shown()[TOKEN] != first[TOKEN]
    assert not list(tmp_path.rglob("*"))
    ray_token.remove()
    assert shown() == {}


@pytest.mark.parametrize(
    "chosen",
    [
        {MODE: "disabled"},
        {MODE: "token", TOKEN: "mine"},
        {MODE: "token", PATH: "/mine"},
        {MODE: "token", TOKEN: "mine", PATH: "/mine"},
    ],
)
def test_what_the_user_has_chosen_is_kept(
    chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in chosen.items():
        monkeypatch.setenv(key, value)
    ray_token.create()
    assert shown() == chosen
    ray_token.remove()
    assert shown() == chosen


@pytest.mark.parametrize("chosen", [{MODE: "token"}, {TOKEN: "mine"}, {PATH: "/mine"}])
def test_what_is_missing_is_added_and_taken_away_again(
    chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in chosen.items():
        monkeypatch.setenv(key, value)
    ray_token.create()
    assert shown().items() > chosen.items()
    assert shown()[MODE] == "token"
    ray_token.remove()
    assert shown() == chosen


def test_what_was_changed_since_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_token.create()
    monkeypatch.setenv(TOKEN, "of another cluster")
    ray_token.remove()
    assert shown() == {TOKEN: "of another cluster"}
