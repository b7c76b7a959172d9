"""A checkpoint continues training bit for bit, and is whole or passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from simclr_ray.config.experiment import AdamWConfig, LARSConfig, SGDConfig
from simclr_ray.errors import CheckpointError
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.precision import prepare_model
from simclr_ray.optim import build_optimizer
from simclr_ray.storage import checkpoint
from simclr_ray.storage.provenance import sha256
from simclr_ray.storage.run_folder import RunFolder

Config = LARSConfig | SGDConfig | AdamWConfig
OPTIMIZERS: list[Config] = [
    LARSConfig(),
    LARSConfig(momentum_form="outside", clip_lr=True),
    SGDConfig(nesterov=True),
    AdamWConfig(),
]


def tiny() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        GlobalBatchNorm(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )
    prepare_model(model, torch.device("cpu"), "float32")  # channels last, as training has it
    return model.train()


def images(step: int) -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (step + 1)
        model(images(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def write(folder: Path, step: int = 3) -> Path:
    checkpoint.write(folder, step, {"model.w": torch.arange(6.0)}, {"digest": "abc"})
    return folder


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: f"{c.name}")
def test_a_restored_run_takes_the_same_next_steps_to_the_last_bit(
    tmp_path: Path, config: Config
) -> None:
    model = tiny()
    optimizer = build_optimizer(model, config)
    train(model, optimizer, range(2))
    packed = {name: t.clone() for name, t in checkpoint.pack(model, optimizer).items()}
    checkpoint.write(tmp_path / "c", 2, packed, {"digest": "d"})
    train(model, optimizer, range(2, 4))

    again = tiny()
    fresh = build_optimizer(again, config)
    found = checkpoint.read(tmp_path / "c")
    checkpoint.unpack(found.tensors, again, fresh)
    assert found.step == 2
    restored = checkpoint.pack(again, fresh)
    assert restored.keys() == packed.keys()
    assert all(torch.equal(restored[name], packed[name]) for name in packed)

    train(again, fresh, range(2, 4))
    expected, got = checkpoint.pack(model, optimizer), checkpoint.pack(again, fresh)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert any(name.startswith("optimizer.") for name in expected)


def test_nothing_of_a_restored_run_keeps_the_file_of_its_checkpoint(tmp_path: Path) -> None:
    """A file that is read by mapping keeps its space while a tensor is in it, removed or not."""
    model, optimizer = torch.nn.Linear(3, 2), None
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors = {name: tensor.clone() for name, tensor in checkpoint.pack(model, optimizer).items()}
    checkpoint.unpack(tensors, model, optimizer)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    ours = [*model.state_dict().values(), *(s["momentum_buffer"] for s in optimizer.state.values())]
    assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in ours}


def test_all_dtypes_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {
        "model.d": torch.rand(3, 4, dtype=torch.float64),
        "model.h": torch.rand(3, 4).bfloat16(),
        "model.n": torch.tensor(7),
        "model.last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last).contiguous(),
    }
    checkpoint.write(tmp_path / "c", 0, tensors, {})
    found = checkpoint.read(tmp_path / "c").tensors
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_record_holds_what_it_was_given_and_the_versions(tmp_path: Path) -> None:
    write(tmp_path / "c")
    record = checkpoint.read_record(tmp_path / "c")
    assert (record["step"], record["digest"], record["format_version"]) == (3, "abc", 3)
    assert set(record["versions"]) == {"simclr-ray", "torch", "torchvision", "ray", "numpy"}
    assert record["versions"]["numpy"] == np.__version__
    size = (tmp_path / "c" / checkpoint.STATE).stat().st_size
    assert record["files"][checkpoint.STATE]["size"] == size


def test_nothing_in_the_directory_is_a_pickle(tmp_path: Path) -> None:
    model = tiny()
    optimizer = build_optimizer(model, LARSConfig())
    train(model, optimizer, range(1))
    checkpoint.write(tmp_path / "c", 1, checkpoint.pack(model, optimizer), {})
    files = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert files == [checkpoint.RECORD, checkpoint.STATE]
    data = (tmp_path / "c" / checkpoint.STATE).read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert "model.0.weight" in json.loads(data[8 : 8 + header])  # safetensors: JSON, then numbers
    assert not data.startswith((b"\x80", b"PK"))


def cut(folder: Path) -> None:
    data = (folder / checkpoint.STATE).read_bytes()
    (folder / checkpoint.STATE).write_bytes(data[:-1])


def alter(folder: Path) -> None:
    data = bytearray((folder / checkpoint.STATE).read_bytes())
    data[-1] ^= 1
    (folder / checkpoint.STATE).write_bytes(bytes(data))


def lose_state(folder: Path) -> None:
    (folder / checkpoint.STATE).unlink()


def lose_record(folder: Path) -> None:
    (folder / checkpoint.RECORD).unlink()


def killed_at_the_record(folder: Path) -> None:
    (folder / checkpoint.RECORD).rename(folder / f".{checkpoint.RECORD}.partial")


def half_a_record(folder: Path) -> None:
    text = (folder / checkpoint.RECORD).read_text()
    (folder / checkpoint.RECORD).write_text(text[: len(text) // 2])


def no_record_at_all(folder: Path) -> None:
    (folder / checkpoint.RECORD).write_text("[1, 2]")


def older_format(folder: Path) -> None:
    record = json.loads((folder / checkpoint.RECORD).read_text())
    (folder / checkpoint.RECORD).write_text(json.dumps({**record, "format_version": 1}))


def edit(folder: Path, *, signed: bool = False, **values: Any) -> None:
    """Change what the record says, with or without the hash of what it says then."""
    path = folder / checkpoint.RECORD
    record = json.loads(path.read_text()) | values
    if signed:
        checkpoint.sign(path, record)
    else:
        path.write_text(json.dumps(record))


def rewrite_state(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Make the state another one, whose hash the record states."""
    state = folder / checkpoint.STATE
    save_file(tensors, state)
    entry = {"size": state.stat().st_size, "sha256": sha256(state)}
    edit(folder, signed=True, files={checkpoint.STATE: entry})


def diverged(folder: Path) -> None:
    """Make the state one that an earlier release would have written: whole, with a NaN in it."""
    rewrite_state(folder, {"model.w": torch.tensor([0.0, 1, 2, 3, 4, float("nan")])})


def other_tensors(folder: Path) -> None:
    rewrite_state(folder, {"model.w": torch.arange(5.0)})


def nameless(folder: Path) -> None:
    edit(folder, signed=True, files=None)


def without_files(folder: Path) -> None:
    edit(folder, signed=True, files={})


def entry_without_size(folder: Path) -> None:
    edit(folder, signed=True, files={checkpoint.STATE: {"sha256": "0"}})


def other_step(folder: Path) -> None:
    edit(folder, signed=True, step=11)


def altered_step(folder: Path) -> None:
    edit(folder, step=11)


def altered_digest(folder: Path) -> None:
    edit(folder, digest="abx")


def unsigned(folder: Path) -> None:
    record = json.loads((folder / checkpoint.RECORD).read_text())
    del record["sha256"]
    (folder / checkpoint.RECORD).write_text(json.dumps(record))


def said_to_be_of_format_2(folder: Path) -> None:
    edit(folder, format_version=2)


def binary(folder: Path) -> None:
    (folder / checkpoint.RECORD).write_bytes(bytes(range(256)))


def bottomless(folder: Path) -> None:
    (folder / checkpoint.RECORD).write_text("[" * 100_000)


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (cut, "missing or of the wrong size"),
    (alter, "altered; its hash is not the recorded one"),
    (lose_state, "missing or of the wrong size"),
    (lose_record, "the checkpoint was not finished"),
    (killed_at_the_record, "the checkpoint was not finished"),
    (half_a_record, "not JSON"),
    (no_record_at_all, "no checkpoint's record"),
    (older_format, "format 1, this release reads 2 and 3; see docs/upgrade.md"),
    (without_files, "no checkpoint's record"),
    (entry_without_size, "no checkpoint's record"),
    (other_step, "is of step 11, its folder of 10"),
    (altered_step, "altered; its hash is not the one that it states"),
    (altered_digest, "altered; its hash is not the one that it states"),
    (unsigned, "altered; its hash is not the one that it states"),
    (said_to_be_of_format_2, "altered; its hash is not the one that it states"),
    (other_tensors, "holds other tensors than were written"),
    (binary, "not JSON"),
    (bottomless, "not JSON"),
    (nameless, "no checkpoint's record"),
    (diverged, r"model\.w is not finite"),
]


def newest(root: Path) -> Path | None:
    with RunFolder.at(str(root)).newest_checkpoint() as found:
        return found


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=lambda f: getattr(f, "__name__", ""))
def test_a_checkpoint_that_is_not_whole_is_refused_and_the_older_whole_one_taken(
    tmp_path: Path, fault: Callable[[Path], None], message: str
) -> None:
    older = write(tmp_path / "step-00000009-0000000a", 9)
    broken = write(tmp_path / "step-00000010-0000000b", 10)
    assert newest(tmp_path) == broken
    fault(broken)
    for read in (checkpoint.read, checkpoint.read_record):
        with pytest.raises(CheckpointError, match=message):
            read(broken)
    assert newest(tmp_path) == older


@pytest.mark.parametrize("key", ["digest", "fingerprint"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, key: str) -> None:
    record = {"digest": "abc", "fingerprint": "fed"}
    folder = tmp_path / "step-00000010-0000000b"
    checkpoint.write(folder, 10, {"model.w": torch.arange(6.0)}, record)
    assert checkpoint.read(folder, record).step == 10
    with pytest.raises(CheckpointError, match=f"of another run: its {key} is .*, not 123"):
        checkpoint.read(folder, record | {key: "123"})
    with RunFolder.at(str(tmp_path)).newest_checkpoint(record | {key: "123"}) as found:
        assert found is None


def test_where_no_finished_checkpoint_can_be_gone_on_from_it_is_said(tmp_path: Path) -> None:
    folder = RunFolder.at(str(tmp_path))
    folder.check_resumable({})
    lose_record(write(tmp_path / "step-00000003-00000001", 3))
    folder.check_resumable({})  # the first one was never finished: nothing is lost
    alter(write(tmp_path / "step-00000009-0000000a", 9))
    cut(write(tmp_path / "step-00000010-0000000b", 10))
    with pytest.raises(CheckpointError, match=r"0000000b: .*wrong size.*0000000a: .*--restart"):
        folder.check_resumable({})
    write(tmp_path / "step-00000005-0000000c", 5)
    folder.check_resumable({})


def test_without_the_optimizers_state_a_checkpoint_is_refused() -> None:
    model = tiny()
    optimizer = build_optimizer(model, LARSConfig())
    train(model, optimizer, range(2))
    packed = checkpoint.pack(model, optimizer)
    without = {name: t for name, t in packed.items() if not name.startswith("optimizer.")}
    again = tiny()
    with pytest.raises(CheckpointError, match="does not hold the state of this optimizer"):
        checkpoint.unpack(without, again, build_optimizer(again, LARSConfig()))


@pytest.mark.parametrize("fault", range(200))
def test_no_random_fault_of_a_file_is_accepted(tmp_path: Path, fault: int) -> None:
    """Bits flipped, bytes lost or added, files swapped: refused, by no error but ours."""
    rng = np.random.default_rng(fault)
    folder = write(tmp_path / "step-00000010-0000000b", 10)
    before = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    path = folder / (checkpoint.RECORD, checkpoint.STATE)[fault % 2]
    data = bytearray(before[path])
    kind = fault // 2 % 4
    at = int(rng.integers(len(data)))
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = rng.bytes(int(rng.integers(1, 64)))
    else:
        data = bytearray(before[next(p for p in before if p != path)])
    path.write_bytes(bytes(data))
    if path.name == checkpoint.RECORD and _says_the_same(before[path], bytes(data)):
        assert checkpoint.read(folder).step == 10  # a space between two values, for one
        return
    with pytest.raises(CheckpointError):
        checkpoint.read(folder)


def _says_the_same(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.w", "optimizer.0.momentum_buffer"])
def test_what_is_not_finite_is_never_written(tmp_path: Path, name: str, value: float) -> None:
    tensors = {"model.n": torch.tensor(3), "model.v": torch.ones(2), name: torch.tensor([1, value])}
    with pytest.raises(CheckpointError, match=f"{name} is not finite at step 7"):
        checkpoint.write(tmp_path / "c", 7, tensors, {})
    assert not (tmp_path / "c").exists()


def test_the_newest_is_by_step_and_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    write(tmp_path / "step-00000900-00000001", 900)
    latest = write(tmp_path / "step-100000000-00000002", 100_000_000)
    for name in ("best", "step-00009999", "step-x", "encoder"):
        write(tmp_path / name, 9999)
    (tmp_path / "step-00099999-00000003").write_text("a file")
    assert newest(tmp_path) == latest


def test_where_there_is_none_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None
    lose_record(write(tmp_path / "step-00000001-00000001", 1))
    assert newest(tmp_path) is None


def test_a_name_is_never_used_again_and_tells_its_step(tmp_path: Path) -> None:
    names = {checkpoint.new_name(1200) for _ in range(50)}
    assert len(names) == 50
    assert {checkpoint.step_of(name) for name in names} == {1200}
    assert all(name.startswith("step-00001200-") for name in names)
    assert checkpoint.step_of("checkpoint_000001") == -1
    write(tmp_path / "c")
    with pytest.raises(FileExistsError):
        write(tmp_path / "c")


def test_tensors_of_another_model_are_refused() -> None:
    model = tiny()
    packed = checkpoint.pack(model, build_optimizer(model, SGDConfig()))
    for wrong in (
        {k: v for k, v in packed.items() if k != "model.0.bias"},
        {**packed, "model.extra": torch.zeros(1)},
        {**packed, "model.0.bias": torch.zeros(9)},
    ):
        with pytest.raises(CheckpointError, match=r"does not fit the model: .+\Z") as raised:
            checkpoint.restore_model(wrong, tiny())
        assert "\n" not in str(raised.value)  # as torch's own has


def test_one_part_of_a_model_can_be_restored_by_its_prefix() -> None:
    whole = nn.ModuleDict({"encoder": nn.Linear(2, 3), "head": nn.Linear(3, 1)})
    packed = checkpoint.pack(whole, torch.optim.SGD(whole.parameters(), lr=0.1))
    encoder = nn.Linear(2, 3)
    checkpoint.restore_model(packed, encoder, prefix="model.encoder.")
    assert torch.equal(encoder.weight, whole["encoder"].get_parameter("weight"))
