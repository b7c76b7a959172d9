"""How often asynchronous halving finds a grid's best, and what it takes: replayed on stored curves.

    python -m benchmarks.halving FOLDER [--orders 1000] [--grace 3]

Nothing is trained: the trials of a finished grid (a study's folder) are shown to Ray Tune's own
scheduler one after the other, in many drawn orders.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from simclr_ray.config.metrics import EPOCH_METRICS
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import StudyFolder
from simclr_ray.studies.plan import Trial
from simclr_ray.studies.search import EPOCH, in_drawn_order, scheduler_of
from simclr_ray.studies.trials import stored_study


def main() -> None:
    """Print a line for each reduction factor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="of a grid that has finished")
    parser.add_argument("--orders", type=int, default=1000)
    parser.add_argument("--grace", type=int, default=3)
    args = parser.parse_args()
    with stored_study(args.folder) as (study, trials):
        replay(args, study, trials)


def replay(args: argparse.Namespace, study: Study, trials: list[Trial]) -> None:
    """Print what each factor finds."""
    outcomes = StudyFolder.at(args.folder).outcomes()
    if study.metric not in EPOCH_METRICS or any(o.status != "finished" for o in outcomes):
        raise SystemExit(
            f"{args.folder}: all trials must have finished, and logged eval/… or train/…"
        )
    curves = {o.trial: {e: v[study.metric] for e, v in o.curve.items()} for o in outcomes}
    print("one in  finds the best  epochs  both, within 60 %")
    for factor in (2, 3, 4):
        settings = {"name": "asha", "reduction_factor": factor, "grace_epochs": args.grace}
        asha = study.scheduler.model_copy(update=settings)
        compared = study.model_copy(update={"scheduler": asha})
        replays = [replayed(compared, trials, curves, seed) for seed in range(args.orders)]
        best = sum(is_best for is_best, _ in replays) / len(replays)
        taken = sum(share for _, share in replays) / len(replays)
        both = sum(is_best and share <= 0.6 for is_best, share in replays) / len(replays)
        print(f"{factor:>6}  {best:>14.1%}  {taken:>6.1%}  {both:>17.1%}")


def replayed(
    study: Study, trials: list[Trial], curves: dict[str, dict[int, float]], seed: int
) -> tuple[bool, float]:
    """Return whether the best was chosen in an order, and the share of the epochs that it took."""
    search = study.search.model_copy(update={"seed": seed})
    scheduler: Any = scheduler_of(study, trials)
    scheduler.set_search_properties(study.metric, study.mode)
    finished, taken = [], 0
    for trial in in_drawn_order(study.model_copy(update={"search": search}), trials):
        shown = SimpleNamespace(trial_id=trial.name)
        scheduler.on_trial_add(None, shown)
        for epoch, value in curves[trial.name].items():
            taken += 1
            result = {EPOCH: epoch, study.metric: value}
            if scheduler.on_trial_result(None, shown, result) == TrialScheduler.STOP:
                break
        else:
            finished.append(trial.name)
    choose = max if study.mode == "max" else min
    last = {name: curve[max(curve)] for name, curve in curves.items()}
    is_best = choose(finished, key=last.__getitem__) == choose(last, key=last.__getitem__)
    return is_best, taken / sum(map(len, curves.values()))


if __name__ == "__main__":
    main()
