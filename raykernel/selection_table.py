"""What `raykernel select` prints: the best choices of layers, and what to mind."""

from __future__ import annotations

import math

from raykernel.analysis.correlation import Expected
from raykernel.analysis.pareto import objective
from raykernel.analysis.predictors import PREDICTORS
from raykernel.analysis.stability import Stability
from raykernel.config import RunConfig
from raykernel.console import Screen, counted, duration, short
from raykernel.ranked import KindSelection, RankedChoice
from raykernel.selections import Selections
from raykernel.terms import Criterion, Method, PromptStyle

_COLUMNS = {
    Criterion.condition_number: "κ raw",
    Criterion.regularised: "κ",
    Criterion.effective_rank: "rank",
    Criterion.trace: "trace",
    Criterion.log_det: "logdet",
    Criterion.effective_dimension: "dim",
    Criterion.alignment: "align",
    Criterion.gradient_norm: "grad",
    Criterion.marginal_likelihood: "evid",
    Criterion.loo_error: "loo err",
    Criterion.loo_accuracy: "loo",
}
"""Criteria that are shown; the table `selections` has all."""
_BASELINES = {
    Criterion.relative_gradient_norm: "rgn",
    Criterion.explained_variance: "eva",
    Criterion.importance: "ada",
}
_LEFT_OUT = (Criterion.loo_error, Criterion.loo_accuracy)
_SIGNS = {Expected.positive: "↑", Expected.negative: "↓"}
_MAX_NAME = 44
"""Characters of a choice that are shown."""


def show_selections(found: Selections, screen: Screen) -> None:
    """Print a table per kind, then what to mind, and where the adapter is.

    Args:
        found: of `selections`.
        screen: where to print.
    """
    config, done = found.prepared.config, found.completion
    for one in found.by_kind:
        _show_kind(found, one, screen)
    screen.out.print(
        f"κ raw, κ: largest over smallest eigenvalue, and with {config.spectrum.ridge:g} of their "
        "mean added; rank, dim: effective rank and dimension; align: alignment\nwith labels; "
        "grad: norm of the first gradient; evid: log marginal likelihood of a row; loo: "
        "leave-one-out error and accuracy of kernel\nregression. ↑ larger is better in theory, ↓ "
        "smaller; none is a law. The table `selections` has more."
    )
    if config.select.baselines:
        screen.out.print(
            "rgn: norm of the gradient over that of the weights (Auto-RGN); eva: share of inputs' "
            f"variance that {config.parameters.r} directions explain, summed over\nmodules (EVA); "
            "ada: AdaLoRA's importance of weights, before training, summed over modules."
        )
    if config.parameters.method is not Method.lora:
        screen.out.print(
            "Note: the kernel is that of the layers' own weights, around which a LoRA's is random; "
            "parameters=lora takes a LoRA's itself."
        )
    if config.prompt.style is PromptStyle.none:
        screen.out.print(
            "Note: the linear probe was fitted to all of train: no leave-one-out accuracy, and the "
            "marginal likelihood flatters."
        )
    if False in found.verdicts:
        screen.out.print(
            f"Not kernel-like: in {found.verdicts.count(False)} of "
            f"{counted(len(found.verdicts), 'stored verdict')} fine-tuning does not behave like "
            "its kernel here, so that what a kernel foretells need not hold (table behavior)."
        )
    elif True not in found.verdicts:
        screen.out.print(
            "Whether fine-tuning behaves like its kernel here is not known: raykernel behavior."
        )
    for one in found.by_kind:
        _show_notes(one, screen)
    screen.out.print(
        f"{done.blocks_computed} of {done.blocks_total} blocks computed now"
        + (f" in {duration(done.seconds)}" if done.blocks_computed else "")
        + f". Kernel {found.prepared.fingerprint}, in {config.store.path}"
    )
    for one in found.by_kind:
        screen.out.print(f"For PEFT ({one.kind.value}): {one.adapter / 'adapter_config.json'}")
        if config.select.rho > 1:
            dropped = sum(len(member.modules) for member in one.choices[0].members) - len(one.ranks)
            screen.out.print(
                f"Ranks by EVA: {min(one.ranks.values())} to {max(one.ranks.values())}, "
                f"{config.parameters.r} on average"
                + (f"; {counted(dropped, 'module')} left out with rank 0." if dropped else ".")
            )
    screen.out.print(f"Next: raykernel finetune … {_overrides(found.by_kind[0])}", markup=False)


def _show_kind(found: Selections, one: KindSelection, screen: Screen) -> None:
    prepared, config = found.prepared, found.prepared.config
    criterion = config.select.criterion
    known = _COLUMNS | _BASELINES
    shown = _COLUMNS | ({} if criterion in known else {criterion: criterion.value})
    for control in (Criterion.size, Criterion.num_parameters):  # these have columns of their own
        shown.pop(control, None)
    if config.prompt.style is PromptStyle.none:
        shown = {key: shown[key] for key in shown if key not in _LEFT_OUT}
    headings = [f"{name}{_SIGNS[PREDICTORS[key].expected]}" for key, name in shown.items()]
    screen.table(
        ["", config.select.candidates.value + "s", "params", *headings],
        [
            [
                _number(choice),
                _name(choice, one),
                f"{choice.start.num_parameters:,}",
                *(_cell(key, choice) for key in shown),
            ]
            for choice in one.choices
        ],
        title=(
            f"{config.task.name}, {config.model.name}, k={config.task.k}, seed {config.task.seed}: "
            f"choices of {one.num_candidates} {config.select.candidates.value}s by "
            f"{criterion.value} of {one.kind.value}, {len(prepared.grid.train)} train examples"
        ),
    )
    how = "all that the budget allows" if one.ranking.is_exhaustive else "greedy with exchanges"
    if 0 < one.ranking.guarantee < 1:
        how += f", at least {one.ranking.guarantee:.0%} of the best there is"
    screen.out.print(f"{counted(one.ranking.num_scored, 'choice')} scored: {how}.")
    _show_again(config, one, screen)
    if one.front:
        _show_front(config, one, screen)


def _show_again(config: RunConfig, one: KindSelection, screen: Screen) -> None:
    """The same choices on other samples, and by what people choose by today."""
    best = one.choices[0]
    columns: dict[str, list[str]] = {}
    if best.halves:
        columns["ranks on halves"] = [_ranks(choice.halves) for choice in one.choices]
    if best.seeds:
        columns["ranks by seed"] = [_ranks(choice.seeds) for choice in one.choices]
    if config.select.baselines:
        for key, name in _BASELINES.items():
            heading = f"{name}{_SIGNS[PREDICTORS[key].expected]}"
            columns[heading] = [_cell(key, choice) for choice in one.choices]
    if columns:
        screen.table(
            ["", f"{config.select.candidates.value}s", *columns],
            [
                [_number(choice), _name(choice, one), *(cells[row] for cells in columns.values())]
                for row, choice in enumerate(one.choices)
            ],
            title="The same choices: "
            + " and ".join(
                ["ranked again"] * bool(best.halves or best.seeds)
                + ["what people choose by today"] * config.select.baselines
            ),
        )
    for ranks, samples in (
        (best.halves, f"{config.select.halves} random halves of train"),
        (best.seeds, f"{len(config.select.seeds) + 1} seeds of the LoRA's A"),
    ):
        if ranks is not None:
            screen.out.print(
                f"Stability: over {samples} the first choice is first of the {one.num_ranked} best "
                f"in {ranks.first:.0%}; its rank is {ranks.best_rank} to {ranks.worst_rank}, "
                f"{short(ranks.mean_rank)} in the mean."
            )


def _show_front(config: RunConfig, one: KindSelection, screen: Screen) -> None:
    """The choices that no other one beats in all objectives."""
    select = config.select
    signs = {key: _SIGNS[objective(key).expected] for key in select.objectives}
    screen.table(
        ["", select.candidates.value + "s", *(f"{k.value}{sign}" for k, sign in signs.items())],
        [
            [str(choice.front), _name(choice, one), *(_cell(key, choice) for key in signs)]
            for choice in one.front[: select.top]
        ],
        title=f"Pareto front of {', '.join(key.value for key in signs)}",
    )
    whole = "of all that the budget allows" if one.is_front_exact else "of those NSGA-II tried"
    more = f", {select.top} of them shown" if len(one.front) > select.top else ""
    screen.out.print(f"{counted(len(one.front), 'choice')} on the front {whole}{more}.")


def _show_notes(one: KindSelection, screen: Screen) -> None:
    """What makes a number doubtful."""
    best = one.choices[0]
    if one.ranking.choices[0].goodness == -math.inf:
        screen.out.print(
            "Unranked: rounding hides what the criterion is made of, of every choice; choose "
            "another, such as select.criterion=regularised."
        )
    if one.num_dead:
        screen.out.print(f"Left out: {counted(one.num_dead, 'candidate')} without any gradient.")
    seen, num = best.start.spectrum, len(one.choices) - 1
    if math.isnan(seen.raw) and not best.is_singular:
        screen.out.print(
            f"Unresolved: rounding hides {seen.num_unresolved} of {seen.size} eigenvalues of the "
            "best choice, whose raw condition number is unknown; read κ with the ridge."
        )
    if poor := [choice for choice in one.choices[:num] if choice.is_singular]:
        screen.out.print(
            f"Infinite: {len(poor)} of the {num} best have fewer features than {seen.size} "
            "rows: their raw condition number is infinite whatever the examples."
        )
    if pairs := [f"{first} = {second}" for first, second in one.duplicates]:
        more = f" and {len(pairs) - 10} more" if len(pairs) > 10 else ""
        screen.out.print(
            f"Duplicates: {counted(len(pairs), 'pair')} of train examples with the same gradients, "
            f"{', '.join(pairs[:10])}{more}. They decide the smallest eigenvalue: leave one out.",
            markup=False,
        )


def _number(choice: RankedChoice) -> str:
    return "all" if choice.rank is None else str(choice.rank)


def _name(choice: RankedChoice, one: KindSelection) -> str:
    if choice.rank is None:
        return f"all {one.num_candidates}"
    name = " ".join(member.name for member in choice.members)
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


def _ranks(found: Stability | None) -> str:
    """Lowest to highest rank."""
    return "" if found is None else f"{found.best_rank}-{found.worst_rank}"


def _cell(criterion: Criterion, choice: RankedChoice) -> str:
    if criterion is Criterion.condition_number and choice.is_singular:
        return "∞"
    if criterion is Criterion.num_parameters:
        return f"{choice.start.num_parameters:,}"
    score = choice.scores[criterion]
    return "?" if math.isnan(score) else short(score)


def _overrides(one: KindSelection) -> str:
    """The best choice as overrides of `finetune`."""
    paths = [path for member in one.choices[0].members for path in member.modules]
    return f"parameters=lora 'parameters.target_modules=[{','.join(paths)}]'"
