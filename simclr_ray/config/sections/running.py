"""Where it runs, how it is evaluated, kept and tracked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import field_validator, model_validator

from simclr_ray.config.moves import OLD_KEY
from simclr_ray.config.schema import AUTO, Config, Field

# Ray's rules, which are Kubernetes': ray/_private/label_utils.py
_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
LABEL_KEY: Final = re.compile(rf"([a-zA-Z0-9][a-zA-Z0-9.-]{{0,251}}[a-zA-Z0-9]/)?{_LABEL}")
LABEL_EXPRESSION: Final = re.compile(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))")


class KNNConfig(Config):
    """Weighted cosine kNN on h: weight exp(cos/τ)."""

    k: int = Field(200, ge=1, description="Neighbours that vote.")
    temperature: float = Field(0.1, gt=0, description="τ of their weights, exp(cosine/τ).")


class LinearConfig(Config):
    """Logistic regression on frozen h."""

    epochs: int = Field(60, ge=1, description="Of the linear probe.")
    batch_size: int = Field(256, ge=1, description="Samples of a step of it.")
    learning_rate: float = Field(0.1, gt=0, description="Per 256 samples; Nesterov SGD, cosine.")


class EvaluationConfig(Config):
    """When and how the encoder is evaluated."""

    every_epochs: int = Field(
        1, ge=0, description="kNN (or label-free metrics) while training; 0: never."
    )
    size: int = Field(
        0, ge=0, le=4096, description="Side of the views that are evaluated; 0: augment.size."
    )
    eval_train_limit: int = Field(5_000, ge=0, description="Bank rows used while training; 0: all.")
    test_limit: int = Field(2_000, ge=0, description="Test rows used while training; 0: all.")
    knn: KNNConfig = KNNConfig()
    linear: LinearConfig = LinearConfig()
    batch_size: int = Field(
        512, ge=1, description="Images per forward pass; on a CPU of 64 a thread at most."
    )
    actors: int | Literal["auto"] = Field(
        AUTO,
        description="Ray Data actors that encode the splits after training; 0: this process; auto: "
        "this process where their views are at most 1 GiB, else one a device of the cluster.",
    )
    cpus_per_actor: float = Field(1.0, gt=0, description="Logical CPUs that one reserves.")
    gpus_per_actor: float = Field(0.0, ge=0, description="Logical GPUs that one reserves.")

    @property
    def num_actors(self) -> int:
        """Return the actors that are asked for by number."""
        return self.actors if isinstance(self.actors, int) else 0

    @field_validator("actors", mode="plain")
    @classmethod
    def _check_actors(cls, value: Any) -> int | str:
        if value == AUTO or (type(value) is int and value >= 0):
            return AUTO if value == AUTO else int(value)
        raise ValueError("must be a whole number, 0 or more, or auto")


class CheckpointConfig(Config):
    """When state is written, and how many are kept."""

    every_epochs: int = Field(1, ge=1, description="Epochs between checkpoints.")
    every_steps: int = Field(0, ge=0, description="Also within an epoch; 0: at epoch ends only.")
    keep: int = Field(2, ge=1, description="Newest checkpoints that stay.")


class ScalingConfig(Config):
    """Where it runs; never what it computes."""

    num_workers: int | list[int] | Literal["auto"] = Field(
        1,
        description="Data-parallel workers; [least, most]: as many as there is room for while it "
        "runs, and the global batch stays; auto, or `scaling: auto`: one a GPU of this machine, "
        "with the CPUs that it has to decode for it, else one on all CPUs.",
    )
    cpus_per_worker: float = Field(0.5, gt=0, description="Logical CPUs a worker reserves.")
    gpus_per_worker: float = Field(0.0, ge=0, description="Logical GPUs a worker reserves.")
    threads_per_worker: int = Field(
        0, ge=0, description="torch threads; 0: the node's cores shared."
    )
    data_actors_per_worker: int = Field(
        1, ge=1, description="Decode actors, each its own pipeline."
    )
    cpus_per_data_actor: float = Field(0.5, gt=0, description="Logical CPUs one reserves.")
    color_augment_on: Literal["data", "worker"] = Field(
        "data", description="Where color and blur run: data actors, or the worker's device."
    )
    worker_label_selector: dict[str, str] = Field(
        {},
        description="Nodes for workers, and for the actors that encode after training: label -> "
        "value, !value, in(a,b) or !in(a,b), as Ray has it; empty: those that "
        "data_label_selector leaves, or any.",
    )
    data_label_selector: dict[str, str] = Field(
        {}, description="Nodes for decode actors, in the same form; empty: any."
    )
    recompute_activations: bool = Field(
        default=False, description="Encoder blocks run again in the backward pass: less memory."
    )
    shared_memory: bool = Field(
        default=True,
        description="Small vectors between ranks of one machine travel through shared memory; "
        "false: through the process group, where /dev/shm is not to be used.",
    )
    wait_for_nodes_s: float = Field(
        0.0,
        ge=0,
        description="How long nodes may take to join before a start, as those that an "
        "autoscaler brings; 0: what lacks room is refused at once.",
    )
    max_failures: int = Field(3, ge=0, description="Restarts from the last checkpoint.")
    collective_timeout_s: float = Field(
        1800.0, gt=0, description="How long a rank waits for the others in a collective."
    )
    stalled_s: float = Field(
        120.0, gt=0, description="A rank is ended when data or a step take longer, and 10 times it."
    )
    startup_s: float = Field(
        600.0, gt=0, description="The same for a start, an evaluation and a checkpoint."
    )

    @model_validator(mode="before")
    @classmethod
    def _check_old_key(cls, tree: Any) -> Any:
        """Refuse `data_resource`; empty, as runs of formats 2 and 3 have it, it says nothing."""
        if not isinstance(tree, Mapping) or OLD_KEY not in tree:
            return tree
        if tree[OLD_KEY]:
            raise ValueError(
                f"{OLD_KEY}={tree[OLD_KEY]} is gone: nodes are chosen by their labels, as in "
                "scaling.data_label_selector.role=data, and given some by `ray start "
                "--labels=role=data` (docs/upgrade.md)"
            )
        return {key: value for key, value in tree.items() if key != OLD_KEY}

    @field_validator("worker_label_selector", "data_label_selector", mode="after")
    @classmethod
    def _check_selector(cls, selector: dict[str, str]) -> dict[str, str]:
        for key, expression in selector.items():
            if not LABEL_KEY.fullmatch(key):
                raise ValueError(
                    f"{key!r} is no key of a label, such as role or ray.io/market-type"
                )
            if not LABEL_EXPRESSION.fullmatch(expression):
                raise ValueError(
                    f"{key}: {expression!r} is no expression; the forms are value, !value, "
                    "in(a,b) and !in(a,b), of letters, digits, and - _ . between them"
                )
        # Ray 2.60 takes "in(a, b)", and then looks for the value " b"
        return {key: expression.replace(" ", "") for key, expression in selector.items()}

    @model_validator(mode="before")
    @classmethod
    def _take_auto(cls, tree: Any) -> Any:
        """Take `scaling: auto` for `scaling: {num_workers: auto}`."""
        return {"num_workers": AUTO} if tree == AUTO else tree

    @field_validator("num_workers", mode="plain")
    @classmethod
    def _check_workers(cls, value: Any) -> int | list[int] | str:
        if value == AUTO:
            return AUTO
        ends = list(value) if isinstance(value, list | tuple) else [value, value]
        if [type(end) for end in ends] != [int, int] or not 1 <= ends[0] <= ends[1]:
            raise ValueError(
                f"must be a whole number of at least 1, [least, most] of such, or {AUTO}"
            )
        return ends if isinstance(value, list | tuple) else ends[0]

    @property
    def worker_selector(self) -> dict[str, str]:
        """Return the label selector of workers: as given, else of what is not for decoding.

        Ray fills a node with workers before it thinks of the decode actors that have no other to
        go to, and both would wait for ever. Of several labels none alone is the opposite.
        """
        if self.worker_label_selector or len(self.data_label_selector) != 1:
            return self.worker_label_selector
        ((key, expression),) = self.data_label_selector.items()
        return {key: expression[1:] if expression.startswith("!") else f"!{expression}"}

    @property
    def is_elastic(self) -> bool:
        """Return whether the number of workers may change while a run trains."""
        return isinstance(self.num_workers, list)

    @property
    def min_workers(self) -> int:
        """Return the fewest workers that a run trains with; 1 until `auto` is resolved."""
        return self._ends[0]

    @property
    def max_workers(self) -> int:
        """Return the most workers that a run trains with; 1 until `auto` is resolved."""
        return self._ends[1]

    @property
    def _ends(self) -> tuple[int, int]:
        if isinstance(self.num_workers, list):
            return self.num_workers[0], self.num_workers[1]
        num = self.num_workers if isinstance(self.num_workers, int) else 1
        return num, num

    @property
    def data_cpus_per_worker(self) -> float:
        """Return the logical CPUs that decode for one worker."""
        return self.data_actors_per_worker * self.cpus_per_data_actor

    @property
    def least_cpus(self) -> float:
        """Return the logical CPUs of a run with the fewest workers, decoding included."""
        return self.min_workers * (self.cpus_per_worker + self.data_cpus_per_worker)

    @property
    def least_gpus(self) -> float:
        """Return the GPUs of a run with the fewest workers."""
        return self.min_workers * self.gpus_per_worker

    @property
    def num_cpus(self) -> float:
        """Return the logical CPUs of a run with the most workers, decoding included."""
        return self.max_workers * (self.cpus_per_worker + self.data_cpus_per_worker)

    @property
    def num_gpus(self) -> float:
        """Return the GPUs of a run with the most workers."""
        return self.max_workers * self.gpus_per_worker


class HealthConfig(Config):
    """What follows where a run diverges or learns nothing more."""

    on_divergence: Literal["stop", "rollback"] = Field(
        "stop",
        description="Of a loss, gradient or weight that is not finite: end the run, or go back to "
        "the last good checkpoint and on with half the rate.",
    )
    on_collapse: Literal["stop", "rollback", "warn"] = Field(
        "stop",
        description="Of an encoder that learns nothing more: end the run, go back as for "
        "on_divergence, or say it and train on, as studies do by default.",
    )
    max_rollbacks: int = Field(3, ge=1, description="Of a whole run; then it ends.")

    @property
    def rolls_back(self) -> bool:
        """Return whether a run may go back by itself."""
        return "rollback" in (self.on_divergence, self.on_collapse)


class TrackingConfig(Config):
    """MLflow."""

    uri: str = Field("", description="Tracking URI; empty: sqlite in `storage`.")
    experiment: str = Field("simclr-ray", min_length=1, description="Of MLflow, its name.")
    parent_run: str = Field("", description="MLflow run under which this one is shown.")
    only_params: list[str] = Field(
        [], description="Dotted keys that become parameters, the rest a digest; empty: all."
    )
    log_every_steps: int = Field(10, ge=1, description="Steps between reports of a loss.")
    system_metrics: bool = Field(
        default=True, description="Log use of CPU, memory, GPU and network, once a minute."
    )


class RegistryConfig(Config):
    """The registered model; an empty `name` registers nothing."""

    name: str = Field("", description="Registered model that the encoder becomes; empty: none.")
    alias: str = Field(
        "newest", min_length=1, description="Alias that is moved to the new version."
    )
    require: str = Field(
        "",
        since=3,
        description="What the version has to show for that, such as "
        "'linear_top1 >= champion - 0.2 * se and effective_rank > 10'; empty: nothing.",
    )
