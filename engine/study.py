"""A search by Optuna: each trial's setting is proposed from the trials before it, and a trial that is worse is pruned over the clips.

A trial is an arm of the run, its clips in the order of the list. After each clip its paired gain over the baseline is an intermediate
value; Optuna's Wilcoxon pruner ends the trial where a signed-rank test over the clips that it shares with the best trial so far says
that it is worse (p below `prune_p`, at least `prune_after` clips). The value of a trial is its mean gain; that of a pruned one is the
best trial's plus the mean difference to it, so that clips which happen to be easy do not flatter it.

study.json in the run directory holds every finished trial. Each proposal is made from it alone, by a sampler with a seed of the trial's
own (`seed_for(recipe seed, "", "search", number)`), so a run that was stopped proposes and prunes as one that was not: its trials have
the same settings and bits, for one version of Optuna. A trial whose method fails on a clip (a rate at which the loss overflows) ends
there and counts as failed. Trials follow one another, so one task makes them all. Needs `pip install 'vidtta[search]'`.
"""

import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from .cluster.place import Place
from .data.clips import Clip
from .errors import UserError
from .files import write_json
from .rundir import first_difference, read_json
from .search import Range, Search, Value, cell
from .seeds import seed_for
from .session import Session, plain_json
from .statistics import pair_results
from .statistics.pairing import HIGHER_IS_BETTER

if TYPE_CHECKING:
    import optuna

Record = dict[str, Any]
RunCell = Callable[[Session, str, list[Clip], Callable[[Clip], bool]], int]
"""run_cell(session of the one arm, arm, clips to do, whether to stop before a clip) -> results that failed."""


def require_optuna() -> None:
    """Raise UserError where Optuna is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("search.sampler optuna needs Optuna; pip install 'vidtta[search]'") from error


def trials_left(session: Session, place: Place, *range_of_clips: int | None) -> int:
    """How many trials are to be made. Raises UserError where Optuna is missing, and where a task would not see all clips."""
    require_optuna()
    if place.world > 1 or any(end is not None for end in range_of_clips):
        raise UserError(
            "search.sampler optuna proposes a trial from those before it on all clips; run it as one task, without "
            "--batch-start and --batch-end"
        )
    return max(0, _search(session).trials - len(read_study(session)))


def read_study(session: Session) -> list[Record]:
    """The trials that the run directory holds, in order. Raises UserError where they were made in another search."""
    path = session.directory.root / "study.json"
    found = read_json(path)
    if found is None:
        return []
    if found["made_under"] != (now := _made_under(session)):
        raise UserError(
            f"{path}: its trials are of another search ({first_difference(found['made_under'], now)}); choose another output_dir"
        )
    return found["trials"]


def _made_under(session: Session) -> dict[str, Any]:
    """All that decides what is proposed and pruned, but for how many trials there are."""
    search = _search(session)
    method = session.recipe.arms[search.arm]
    return plain_json(
        {
            "optuna": importlib.metadata.version("optuna"),
            "grid": {key: vars(axis) if isinstance(axis, Range) else axis for key, axis in search.grid.items()},
            **{name: getattr(search, name) for name in ("metric", "prune_p", "prune_after")},
            "clips": [clip.id for clip in session.listed],
            "settings": session.settings(session.baseline),
            "adaptation": vars(session.recipe.adaptation),
            "method": {"kind": method.kind, **asdict(method)},
        }
    )


def _search(session: Session) -> Search:
    assert session.recipe.search is not None
    return session.recipe.search


def run_study(session: Session, run_cell: RunCell, say: Callable[[str], object]) -> list[Record]:
    """Make the trials that study.json lacks; returns all of them. The baseline's results must be there: clips without one are left out."""
    search, records = _search(session), read_study(session)
    while len(records) < search.trials:
        trial = Trial(session, records)
        failed = run_cell(trial.session, trial.arm, trial.unfinished(), trial.stop_before)
        records.append(trial.record(failed))
        write_json(session.directory.root / "study.json", {"made_under": _made_under(session), "trials": records})
        say(f"trial {len(records)} of {search.trials}: {trial.arm}  {records[-1]['state']}, {len(trial.gains)} clips")
    return records


class Trial:
    """The next trial: proposed from the records before it. gains: by the clip's place in the list, more is better."""

    def __init__(self, session: Session, records: list[Record]) -> None:
        self.search, self.records = _search(session), records
        self.number = len(records)
        study = _rebuild(self.search, session.recipe.seed, records)
        self.asked = study.ask()
        self.values = {key: _suggest(self.asked, key, axis) for key, axis in self.search.grid.items()}
        self.arm, method = cell(self.search, session.recipe.arms[self.search.arm], self.values)
        plain = {name: arm for name, arm in session.recipe.arms.items() if arm.kind == "none"}
        recipe = replace(session.recipe, arms={**plain, self.arm: method}, search=None, placebos=(), gate={})
        self.session = replace(session, recipe=recipe)
        self.gains: dict[int, float] = {}
        self.pruned = self.failed = False

    def unfinished(self) -> list[Clip]:
        """The clips to do, in order."""
        return [clip for _, clip in self._clips() if not self.session.finished(self.arm, clip)]

    def _clips(self) -> list[tuple[int, Clip]]:
        """Those with a baseline, with their places in the list."""
        done = self.session.directory.result
        return [(place, clip) for place, clip in enumerate(self.session.clips) if done(self.session.baseline, clip.id)]

    def stop_before(self, clip: Clip | None) -> bool:
        """Whether to end the trial before a clip (None: before the end), by the gains on those before it, one after the other."""
        for place, one in self._clips():
            if self.pruned or self.failed or (clip and one.id == clip.id):
                break
            if place in self.gains:
                continue
            gain = self._gain(one)
            if gain is None:
                if clip is None:
                    return False  # not made yet
                self.failed = True
                break
            self.gains[place] = gain
            self.asked.report(gain, place)
            self.pruned = bool(self.search.prune_p) and self.asked.should_prune()
        return self.pruned or self.failed

    def _gain(self, clip: Clip) -> float | None:
        """Mean gain over the baseline on a clip, over its samples; None where there is no result."""
        ours, theirs = (self.session.directory.result(arm, clip.id) for arm in (self.arm, self.session.baseline))
        if ours is None or theirs is None:
            return None
        values = (pair_results([ours], [theirs]).differences(self.search.metric) or {}).get(clip.id)
        if not values:
            raise UserError(f"search.metric {self.search.metric}: the results lack it; choose another score")
        return (1 if self.search.metric in HIGHER_IS_BETTER else -1) * fmean(values)

    def record(self, failed: int) -> Record:
        """The trial as study.json holds it, after its clips ran."""
        self.stop_before(None)
        state = "failed" if failed or self.failed or not self.gains else "pruned" if self.pruned else "complete"
        value = fmean(self.gains.values()) if state != "failed" else None
        if state == "pruned":
            best = max((r for r in self.records if r["state"] != "failed"), key=lambda r: r["value"])
            both = [gain - best["gains"][str(k)] for k, gain in self.gains.items() if str(k) in best["gains"]]
            value = best["value"] + fmean(both)
        return {
            "number": self.number,
            "arm": self.arm,
            "values": self.values,
            "params": self.asked.params,
            "state": state,
            "value": value,
            "gains": {str(k): gain for k, gain in self.gains.items()},
        }


def _rebuild(search: Search, seed: int, records: list[Record]) -> "optuna.Study":
    """A study that holds these trials and proposes the next one as it would have in any process."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed_for(seed, "", "search", len(records)) % 2**32, n_startup_trials=search.startup_trials
        )
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=search.prune_p or 0.1, n_startup_steps=search.prune_after)
    study = optuna.create_study(sampler=sampler, pruner=pruner, direction="maximize")
    distributions = {key: _distribution(axis) for key, axis in search.grid.items()}
    states = optuna.trial.TrialState
    for record in records:
        failed = record["state"] == "failed"
        study.add_trial(
            optuna.trial.create_trial(
                state=states.FAIL if failed else states.COMPLETE,
                params=record["params"],
                distributions=distributions,
                value=record["value"],
                intermediate_values={int(place): gain for place, gain in record["gains"].items()},
            )
        )
    return study


def _distribution(axis: tuple[Value, ...] | Range) -> "optuna.distributions.BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(axis, Range):
        return CategoricalDistribution(axis)
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _suggest(trial: "optuna.Trial", key: str, axis: tuple[Value, ...] | Range) -> Value:
    """A value for a key; of a range of real numbers to three digits, so that it reads and is named as it is."""
    if not isinstance(axis, Range):
        return cast(Value, trial.suggest_categorical(key, axis))
    if axis.whole:
        return trial.suggest_int(key, int(axis.low), int(axis.high), log=axis.log)
    return float(f"{trial.suggest_float(key, axis.low, axis.high, log=axis.log):.3g}")
