"""`run.json`: which run a folder holds, and where it is tracked."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields, replace

from simclr_ray.errors import ConfigError
from simclr_ray.storage.checkpoint import FORMAT_VERSION, FORMATS_READ
from simclr_ray.storage.run_folder import CONFIG_FILE, RUN_FILE, RunFolder
from simclr_ray.storage.tracking_place import read_uri, stored_uri


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says of its run.

    Attributes:
        mlflow_run_id: Run in the MLflow store.
        tracking_uri: Of that store; in the file relative to the folder, where it can be.
        fingerprint: Of the training images.
        digest: Of the experiment.
        format_version: Of the folder.
        rollbacks: How often the run went back to a checkpoint by itself; in the file where it did.
        rate_multiplier: Of the learning rate, for that.
    """

    mlflow_run_id: str
    tracking_uri: str
    fingerprint: str
    digest: str
    format_version: int = FORMAT_VERSION
    rollbacks: int = 0
    rate_multiplier: float = 1.0

    @classmethod
    def find(cls, folder: RunFolder) -> RunRecord | None:
        """Return the record of a folder, or None where no run has begun in it.

        One that cannot be read, as a power cut leaves a file, counts as absent, and that is said.

        Raises:
            ConfigError: It is of another format, or not whole.
        """
        tree = folder.read_json(RUN_FILE, dict)
        if tree is None:
            return None
        version = tree.get("format_version", 1)
        if version not in FORMATS_READ:
            read = " and ".join(map(str, FORMATS_READ))
            problem = f"format {version}, this release reads {read}; see docs/upgrade.md"
            raise ConfigError.of(folder.below(RUN_FILE), problem)
        names = {field.name for field in fields(cls)}
        values = {key: value for key, value in tree.items() if key in names}
        defaults = {field.name for field in fields(cls) if field.default is not MISSING}
        if missing := sorted(names - defaults - set(values)):
            problem = f"is no whole record: it lacks {', '.join(missing)}"
            raise ConfigError.of(folder.below(RUN_FILE), problem)
        record = cls(**values)
        kinds: dict[str, tuple[type, ...]] = {
            "format_version": (int,), "rollbacks": (int,), "rate_multiplier": (int, float),
        }  # fmt: skip
        wrong = [key for key in values if type(values[key]) not in kinds.get(key, (str,))]
        if wrong:
            problem = f"is no record: {', '.join(wrong)} is of another type"
            raise ConfigError.of(folder.below(RUN_FILE), problem)
        return replace(record, tracking_uri=read_uri(record.tracking_uri, folder, CONFIG_FILE))

    @classmethod
    def read(cls, folder: RunFolder) -> RunRecord:
        """Return the record of a run folder; raise `ConfigError` where there is none."""
        record = cls.find(folder)
        if record is None:
            raise ConfigError.of(folder.uri, f"is no run folder: it has no {RUN_FILE}")
        return record

    def write(self, folder: RunFolder) -> None:
        """Write the record into the folder."""
        stored = replace(self, tracking_uri=stored_uri(self.tracking_uri, folder))
        tree = asdict(stored)
        if not self.rollbacks:
            del tree["rollbacks"], tree["rate_multiplier"]
        folder.write_text(RUN_FILE, json.dumps(tree, indent=1))
