"""Result rows: one small immutable Parquet file per row or curve, never half-written.

A writer has a file name of its own, made of the row's key columns, so that writers need no lock
and the same question answered again replaces its own answer. Files written before a column
existed read as null there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raykernel.config import fingerprint
from raykernel.errors import BlockCorruptError, InputError, nearest
from raykernel.store.commit import commit, make_folder

_TEXTS = pa.list_(pa.string())
_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True, slots=True)
class ResultTable:
    """The schema of a table, its key, and where its files lie."""

    schema: pa.Schema
    key: tuple[str, ...]
    """Columns that no two files share all of."""
    folder: str
    """Below the store; `{column}` inserts a value."""
    stem: str = "result"
    """Beginning of its files' names."""
    order: tuple[str, ...] = ("created",)
    """Columns that rows are sorted by."""


TABLES = {
    "kernels": ResultTable(
        pa.schema(
            [
                ("fingerprint", pa.string()),  # of the kernel
                ("kind", pa.string()),
                ("solver", pa.string()),  # canonical JSON of the solver settings
                ("task", pa.string()),
                ("model", pa.string()),
                ("prompt", pa.string()),
                ("k", pa.int64()),
                ("seed", pa.int64()),
                ("precision", pa.string()),
                ("num_outputs", pa.int64()),
                ("num_train", pa.int64()),
                ("num_dev", pa.int64()),
                ("num_test", pa.int64()),
                ("metric", pa.string()),
                ("zero_shot", pa.float64()),  # on test, as the next two
                ("linear_probe", pa.float64()),
                ("kernel_regression", pa.float64()),
                ("output_derivative", pa.float64()),  # mean |χ| on test, before training
                ("test_by", pa.string()),  # how test was predicted: tangent (J w) or block
                ("dev", pa.float64()),  # of the grid point selected, whose settings follow
                ("solved_by", pa.string()),  # ridge, logistic or asymmetric
                ("ridge", pa.float64()),
                ("f0_scaling", pa.float64()),
                ("gamma", pa.float64()),  # of the asymmetric solver, as c
                ("c", pa.float64()),
                ("iterations", pa.int64()),
                ("residual", pa.float64()),
                ("condition_number", pa.float64()),
                ("lora_error", pa.float64()),  # largest of an entry, of a LoRA, over |g| |g'|
                ("lora_bound", pa.float64()),  # of Theorem D.5 on that; null: it says nothing
                ("groups", _TEXTS),  # patterns; empty: all
                ("blocks_total", pa.int64()),
                ("blocks_computed", pa.int64()),  # by this run; the others were stored
                ("seconds", pa.float64()),
                ("peak_memory_bytes", pa.int64()),
                ("path", pa.string()),  # of the kernel, below the store
                ("created", _TIME),
                ("versions", pa.string()),  # JSON: package → version
                ("overrides", _TEXTS),
                ("identity", pa.string()),  # JSON
            ]
        ),
        key=("fingerprint", "kind", "solver"),
        folder="kernels/{fingerprint}",
    ),
    "spectra": ResultTable(
        pa.schema(
            [
                ("fingerprint", pa.string()),  # of the kernel
                ("kind", pa.string()),
                ("groups", _TEXTS),  # patterns that chose the sum; empty: all, or one layer group
                ("ridge", pa.float64()),  # sigma over mean
                ("layer_group", pa.string()),  # null: the sum of several
                ("layer", pa.int64()),  # of the layer group; null outside of transformer layers
                ("layers", pa.list_(pa.int64())),  # transformer layers of all groups summed
                ("modules", _TEXTS),  # last parts of their modules' paths
                ("num_groups", pa.int64()),  # summed
                ("num_features", pa.int64()),  # rank at most; null: not counted
                ("change", pa.string()),  # add, remove: readings of groups with layer or without;
                ("kappa_before", pa.float64()),  # null: of groups. Of groups itself, with sigma
                ("kappa_low", pa.float64()),  # bounds of `regularised` afterwards
                ("kappa_high", pa.float64()),
                ("top_low", pa.float64()),  # bounds of top + sigma afterwards
                ("top_high", pa.float64()),
                ("bottom_low", pa.float64()),  # bounds of bottom + sigma afterwards
                ("bottom_high", pa.float64()),
                ("is_sufficient", pa.bool_()),  # of an addition, for it to lower kappa
                ("is_necessary", pa.bool_()),
                ("slope", pa.float64()),  # of log kappa, where a little of the layer is added
                ("duplicates", _TEXTS),  # `id = id`: train examples that the sum takes for one
                ("task", pa.string()),
                ("model", pa.string()),
                ("prompt", pa.string()),
                ("k", pa.int64()),
                ("seed", pa.int64()),
                ("num_outputs", pa.int64()),
                ("num_train", pa.int64()),
                ("parameters", pa.string()),  # JSON: the whole group
                ("outputs", pa.string()),  # contrast: what softmax sees; full: all
                ("num_rows", pa.int64()),  # of their kernel, and so eigenvalues
                ("num_unresolved", pa.int64()),  # eigenvalues that are rounding noise: they count
                ("floor", pa.float64()),  # as 0, and null is a number made of them; this at most
                ("sigma", pa.float64()),  # the ridge, in units of the kernel
                ("trace_share", pa.float64()),  # of all layers' trace
                ("top", pa.float64()),  # largest eigenvalue
                ("bottom", pa.float64()),  # smallest
                ("mean", pa.float64()),
                ("condition_number", pa.float64()),  # top / bottom; inf: fewer features than rows
                ("condition_number_at_least", pa.float64()),  # known in spite of noise
                ("regularised", pa.float64()),  # (top + sigma) / (bottom + sigma)
                ("regularised_at_least", pa.float64()),
                ("truncated", pa.float64()),  # top over the smallest that is no noise
                ("top_over_median", pa.float64()),
                ("top_over_mean", pa.float64()),
                ("mean_over_bottom", pa.float64()),
                ("amgm_gap", pa.float64()),  # log arithmetic over geometric mean, with sigma
                ("stable_rank", pa.float64()),
                ("participation", pa.float64()),
                ("effective_rank", pa.float64()),
                ("effective_dimension", pa.float64()),  # of sigma
                ("full_condition_number", pa.float64()),  # of all outputs, as the next
                ("full_regularised", pa.float64()),
                ("centred_condition_number", pa.float64()),  # without the mean over examples
                ("centred_regularised", pa.float64()),
                ("loo_accuracy", pa.float64()),  # of train examples predicted from the others by
                ("loo_error", pa.float64()),  # ridge regression with sigma, of `outputs`: mean of
                # the squared norm left of one-hot labels; null: of changes, noise, a linear probe
                ("lipschitz", pa.float64()),  # of all train outputs in the parameters; null: signs
                ("path", pa.string()),
                ("created", _TIME),
                ("overrides", _TEXTS),
            ]
        ),
        key=("fingerprint", "kind", "groups", "ridge"),
        folder="kernels/{fingerprint}",
        stem="spectra",
    ),
    "selections": ResultTable(
        pa.schema(
            [
                ("fingerprint", pa.string()),  # of the kernel
                ("kind", pa.string()),
                ("settings", pa.string()),  # JSON: the whole group select
                ("ridge", pa.float64()),
                ("criterion", pa.string()),
                ("rank", pa.int64()),  # 1: the best; null: all candidates, for comparison, or a
                # choice of the front that is not among the best
                ("front", pa.int64()),  # place on the Pareto front of the objectives, from the best
                # in the first one; null: another choice of those tried is better
                ("candidates", _TEXTS),  # the choice
                ("layers", pa.list_(pa.int64())),  # transformer layers that it lies in
                ("target_modules", _TEXTS),  # whole paths in the plain model
                ("adapter", pa.string()),  # folder of adapter_config.json; null: not the best
                ("task", pa.string()),
                ("model", pa.string()),
                ("prompt", pa.string()),
                ("k", pa.int64()),
                ("seed", pa.int64()),
                ("num_outputs", pa.int64()),
                ("num_train", pa.int64()),
                ("parameters", pa.string()),  # JSON: the whole group
                ("num_scored", pa.int64()),  # choices that the criterion has scored
                ("is_exhaustive", pa.bool_()),  # these are all within the budget
                ("guarantee", pa.float64()),  # part of the best's goodness that the first one has
                # at least; 0: not known
                ("num_ranked", pa.int64()),  # best choices that were ranked again
                ("half_mean_rank", pa.float64()),  # among them on random halves of train; null:
                ("half_best_rank", pa.int64()),  # the criterion has no samples, or is not asked to
                ("half_worst_rank", pa.int64()),
                ("half_first", pa.float64()),  # share of halves in which none is better
                ("seed_mean_rank", pa.float64()),  # the same over a LoRA's random A
                ("seed_best_rank", pa.int64()),
                ("seed_worst_rank", pa.int64()),
                ("seed_first", pa.float64()),
                ("is_front_exact", pa.bool_()),  # of all choices within the budget; null: no front
                ("outputs", pa.string()),  # contrast: what softmax sees; full: a single one
                ("num_rows", pa.int64()),
                ("num_unresolved", pa.int64()),  # eigenvalues that are rounding noise
                ("num_features", pa.int64()),  # rank at most; null: not counted
                ("sigma", pa.float64()),  # ridge of all choices, in units of the kernel
                ("size", pa.int64()),  # control: candidates in the choice
                ("num_parameters", pa.int64()),  # control: that the LoRA trains
                ("random", pa.float64()),  # control
                (
                    "condition_number",
                    pa.float64(),
                ),  # null: a number of it is noise, as in all that follow
                ("regularised", pa.float64()),  # with ridge of its own mean
                ("top_over_median", pa.float64()),
                ("amgm_gap", pa.float64()),
                ("effective_rank", pa.float64()),
                ("trace", pa.float64()),
                ("log_det", pa.float64()),  # with sigma, as the next
                ("effective_dimension", pa.float64()),
                ("alignment", pa.float64()),
                ("gradient_norm", pa.float64()),
                ("complexity", pa.float64()),  # with sigma
                ("marginal_likelihood", pa.float64()),  # log, of a row
                ("loo_error", pa.float64()),
                ("loo_accuracy", pa.float64()),  # null: a single output
                ("relative_gradient_norm", pa.float64()),  # baselines, null: not measured
                ("explained_variance", pa.float64()),  # sum over modules, as the next
                ("importance", pa.float64()),
                ("path", pa.string()),
                ("created", _TIME),
                ("overrides", _TEXTS),
            ]
        ),
        key=("fingerprint", "kind", "settings", "ridge"),
        folder="selections",
        stem="selection",
        order=("created", "rank"),
    ),
    "trials": ResultTable(
        pa.schema(
            [
                ("trial", pa.string()),  # hash of what decides the numbers
                ("task", pa.string()),
                ("model", pa.string()),
                ("prompt", pa.string()),
                ("k", pa.int64()),
                ("seed", pa.int64()),  # of the few-shot sample
                ("method", pa.string()),  # full, lora: which parameters are trained
                ("intrinsic_dimension", pa.int64()),  # null: not confined to random directions
                ("optimizer", pa.string()),
                ("loss", pa.string()),
                ("regularization", pa.string()),  # pull to the start; none, too, where lam is 0
                ("lam", pa.float64()),  # λ of λ/2 ‖θ - θ_0‖²
                ("convention", pa.string()),  # of the loss that λ is weighed against; null: none
                ("sigma", pa.float64()),  # of the kernel ridge regression with the same minimum, in
                # units of the kernel; null: it is none, as with cross-entropy
                ("learning_rate", pa.float64()),
                ("batch_size", pa.int64()),
                ("steps", pa.int64()),
                ("training_seed", pa.int64()),  # of the order of examples and of dropout
                ("precision", pa.string()),
                ("num_parameters", pa.int64()),  # that are trained
                ("num_outputs", pa.int64()),
                ("num_train", pa.int64()),
                ("num_dev", pa.int64()),
                ("num_test", pa.int64()),
                ("metric", pa.string()),
                ("zero_shot", pa.float64()),  # on test, as the next two
                ("linear_probe", pa.float64()),
                ("finetuned", pa.float64()),  # with the parameters that are best on dev
                ("dev", pa.float64()),  # of the same parameters
                ("best_step", pa.int64()),
                ("distance", pa.float64()),  # their Euclidean distance from the start
                ("seconds", pa.float64()),  # of training and evaluation
                ("peak_memory_bytes", pa.int64()),
                ("weights_checksum", pa.string()),  # xxh3 of best.safetensors; null: not kept
                ("path", pa.string()),  # of the trial, below the store
                ("created", _TIME),
                ("versions", pa.string()),  # JSON: package → version
                ("overrides", _TEXTS),
                ("parameters", pa.string()),  # JSON: the whole group
                ("training", pa.string()),  # JSON: the whole group
                ("identity", pa.string()),  # JSON
            ]
        ),
        key=("trial",),
        folder="trials/{trial}",
        stem="trial",
    ),
    "curves": ResultTable(
        pa.schema(
            [
                ("trial", pa.string()),
                ("step", pa.int64()),  # steps done; 0 is the start
                ("epoch", pa.float64()),  # passes over train
                ("train_loss", pa.float64()),  # mean since the last row, without a pull's penalty
                ("dev_loss", pa.float64()),
                ("dev_score", pa.float64()),
                ("learning_rate", pa.float64()),  # of the last step
                ("gradient_norm", pa.float64()),  # of the last step, unclipped; with coupled pull
                ("distance", pa.float64()),  # from the start, Euclidean
            ]
        ),
        key=("trial",),
        folder="trials/{trial}",
        stem="curve",
        order=("trial", "step"),
    ),
    "twins": ResultTable(
        pa.schema(
            [
                ("trial", pa.string()),  # the fine-tuning run f; all is of its last step
                ("split", pa.string()),  # train, dev or test, on which the next numbers are
                ("num_examples", pa.int64()),
                ("task", pa.string()),
                ("model", pa.string()),
                ("prompt", pa.string()),
                ("k", pa.int64()),
                ("seed", pa.int64()),
                ("method", pa.string()),
                ("optimizer", pa.string()),
                ("loss", pa.string()),
                ("regularization", pa.string()),
                ("lam", pa.float64()),
                ("convention", pa.string()),
                ("learning_rate", pa.float64()),
                ("batch_size", pa.int64()),
                ("steps", pa.int64()),
                ("metric", pa.string()),  # of the next four
                ("start_score", pa.float64()),  # of f_0
                ("score", pa.float64()),  # of f, not of the parameters that are best on dev
                ("score_a", pa.float64()),  # of the twin: the linear model, trained itself
                ("score_b", pa.float64()),  # of the linear model at the parameters of f
                ("agreement_a", pa.float64()),  # share of examples with the same largest logit
                ("agreement_b", pa.float64()),
                ("change", pa.float64()),  # mean ‖f − f_0‖ of an example's logits
                ("distance_a", pa.float64()),  # mean ‖f − f̄‖
                ("distance_b", pa.float64()),
                ("relative_a", pa.float64()),  # over change; null: nothing changed
                ("relative_b", pa.float64()),
                ("kl_a", pa.float64()),  # mean KL(softmax f ‖ softmax f̄), nats
                ("kl_b", pa.float64()),
                ("kl_reverse_a", pa.float64()),  # mean KL(softmax f̄ ‖ softmax f), nats
                ("kl_reverse_b", pa.float64()),
                ("deviation", pa.float64()),  # ‖θ − θ_0‖ of f; the next ones are of no split, too
                ("deviation_relative", pa.float64()),  # over ‖θ_0‖
                ("twin_deviation", pa.float64()),  # ‖θ̄ − θ_0‖ of the twin
                ("apart", pa.float64()),  # ‖θ − θ̄‖
                ("adapter_change", pa.float64()),  # mean ‖s B A‖ of adapted matrices; null: none
                ("adapter_relative", pa.float64()),  # mean of ‖s B A‖ / ‖W_0‖
                ("modules", pa.string()),  # JSON: module → both
                ("seconds", pa.float64()),  # of the twin's training
                ("peak_memory_bytes", pa.int64()),
                ("last_checksum", pa.string()),  # xxh3 of last.safetensors
                ("weights_checksum", pa.string()),  # xxh3 of twin.safetensors
                ("path", pa.string()),
                ("created", _TIME),
                ("versions", pa.string()),
                ("overrides", _TEXTS),
            ]
        ),
        key=("trial",),
        folder="trials/{trial}",
        stem="twins",
        order=("created", "split"),
    ),
    "bounds": ResultTable(
        pa.schema(
            [
                ("trial", pa.string()),
                ("quantity", pa.string()),  # deviation ‖θ − θ_0‖, or distance to the twin on train
                ("name", pa.string()),  # printed, or a companion of it
                ("bound", pa.float64()),  # null: not of this run
                ("measured", pa.float64()),
                ("holds", pa.bool_()),
                ("slack", pa.float64()),  # larger over smaller
                ("assumes", pa.string()),  # or what of that is not met
                ("lipschitz", pa.float64()),  # largest ‖J‖ of train that was seen, of any below
                ("lipschitz_start", pa.float64()),  # at θ_0
                ("lipschitz_end", pa.float64()),  # at θ
                ("lipschitz_mean", pa.float64()),  # at random points as far away; null: none
                ("lipschitz_samples", pa.int64()),  # such points
                ("curvature", pa.float64()),  # of F, seen from θ_0 to θ: ‖J − J_0‖ / ‖θ − θ_0‖, or
                # what the remainder implies if that is more
            ]
        ),
        key=("trial",),
        folder="trials/{trial}",
        stem="bounds",
        order=("trial",),
    ),
    "behavior": ResultTable(
        pa.schema(
            [
                ("fingerprint", pa.string()),  # of the kernel at the pre-trained weights
                ("trial", pa.string()),  # the fine-tuning run
                ("solver", pa.string()),  # canonical JSON of the solver settings
                ("criteria", pa.string()),  # canonical JSON of thresholds and sample
                ("task", pa.string()),
                ("model", pa.string()),
                ("prompt", pa.string()),
                ("k", pa.int64()),
                ("seed", pa.int64()),
                ("optimizer", pa.string()),
                ("solves", pa.bool_()),  # null: undefined, as in the next three
                ("linearization", pa.bool_()),
                ("fixed_features", pa.bool_()),
                ("kernel_behavior", pa.bool_()),  # all three
                ("reasons", pa.string()),  # JSON: criterion → one clause
                ("kind", pa.string()),  # of kernel regression: the best one for the optimizer
                ("metric", pa.string()),  # of the next two, on test
                ("kernel_regression", pa.float64()),
                ("finetuned", pa.float64()),
                ("linearization_metric", pa.string()),  # of the next three, on test
                ("pretrained_score", pa.float64()),
                ("linearized_score", pa.float64()),
                ("finetuned_score", pa.float64()),
                ("taylor_error", pa.float64()),  # ‖f_FT − f_lin‖ / ‖f_FT − f_PT‖ on test
                ("compared_kind", pa.string()),  # of the kernels before and after
                ("num_compared", pa.int64()),  # test examples of the compared block
                ("mean_relative_distance", pa.float64()),  # null: undefined, as in all distances
                ("mean_apart", pa.float64()),  # the same without near-zero denominators
                ("median_relative_distance", pa.float64()),
                ("frobenius_distance", pa.float64()),
                ("cka", pa.float64()),  # centred kernel alignment
                ("near_zero_share", pa.float64()),  # of the entries before fine-tuning
                ("zero_share", pa.float64()),
                ("chi_pretrained", pa.float64()),  # mean |output derivative| on test
                ("chi_finetuned", pa.float64()),
                ("tuned_fingerprint", pa.string()),  # of the kernel at the trial's weights
                ("path", pa.string()),
                ("created", _TIME),
                ("overrides", _TEXTS),
            ]
        ),
        key=("fingerprint", "trial", "solver", "criteria"),
        folder="behavior",
    ),
    "runs": ResultTable(
        pa.schema(
            [
                ("study", pa.string()),  # a file of sweeps/, or the command that had -m
                ("run", pa.string()),  # hash of command and resolved configuration
                ("arm", pa.string()),  # method of the study
                ("command", pa.string()),
                ("status", pa.string()),  # ok, failed, or stopped early
                ("cause", pa.string()),  # of failure: memory, diverged, input, lost, error
                ("error", pa.string()),  # what was said
                ("results", pa.string()),  # JSON: [table, key columns] of every result
                ("seconds", pa.float64()),
                ("host", pa.string()),
                ("created", _TIME),
                ("versions", pa.string()),
                ("overrides", _TEXTS),
            ]
        ),
        key=("study", "run"),
        folder="runs/{study}",
        stem="run",
    ),
}


def write_result(root: Path, table: str, row: dict[str, Any]) -> Path:
    """Commit one row; a row with the same key is replaced.

    Args:
        root: folder of the store.
        table: name of the table.
        row: value by column; columns left out are null, `created` is now, `path` is known.

    Returns:
        The file.
    """
    return write_results(root, table, [row])


def write_results(root: Path, table: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Commit rows of one key as one file; rows with the same key are replaced.

    Args:
        root: folder of the store.
        table: name of the table.
        rows: at least one, as in `write_result`.

    Returns:
        The file.

    Raises:
        ValueError: if a column is unknown, a key column absent, or the keys differ.
    """
    spec = _spec(table)
    for name in {name for row in rows for name in row}:
        if name not in spec.schema.names:
            raise ValueError(
                f"{table}: unknown column {name!r}; {nearest(name, spec.schema.names)}"
            )
    first = rows[0]
    if absent := [name for name in spec.key if first.get(name) is None]:
        raise ValueError(f"{table}: found no {', '.join(absent)}, expected the whole key")
    if any(row[name] != first[name] for row in rows for name in spec.key):
        raise ValueError(f"{table}: found rows of several keys, expected one key in a file")
    known = {"created": datetime.now(timezone.utc), "path": spec.folder.format(**first)}
    sink = pa.BufferOutputStream()
    # Columns that a table does not have, such as a curve's `path`, are left out by the schema.
    arrow = pa.Table.from_pylist([known | row for row in rows], schema=spec.schema)
    pq.write_table(arrow, sink, write_page_checksum=True)
    path = result_path(root, table, first)
    make_folder(path.parent)
    commit(path, memoryview(sink.getvalue()))
    return path


def result_path(root: Path, table: str, row: dict[str, Any]) -> Path:
    """The file of a row: its name is made of the key columns.

    Args:
        root: folder of the store.
        table: name of the table.
        row: value by column, the key columns among them.

    Returns:
        The path, whether or not it exists.
    """
    spec = _spec(table)
    name = f"{spec.stem}-{fingerprint([row[name] for name in spec.key])}.parquet"
    return root / spec.folder.format(**row) / name


def read_results(root: Path, table: str) -> pa.Table:
    """All rows of a table, oldest first; of a curve by step.

    Args:
        root: folder of the store.
        table: name of the table.

    Returns:
        The rows in the table's schema.
    """
    spec = _spec(table)
    rows = [read_row_file(path, spec.schema) for path in result_files(root, table)]
    if not rows:
        return spec.schema.empty_table()
    return pa.concat_tables(rows).sort_by([(name, "ascending") for name in spec.order])


def read_key(root: Path, table: str, key: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one key.

    Args:
        root: folder of the store.
        table: name of the table.
        key: value by key column.

    Returns:
        Value by column; none if no such row is stored.
    """
    path = result_path(root, table, key)
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = read_row_file(path, _spec(table).schema).to_pylist()
    return rows


def result_files(root: Path, table: str) -> list[Path]:
    """Files of a table.

    Args:
        root: folder of the store.
        table: name of the table.

    Returns:
        Their paths, sorted.
    """
    spec = _spec(table)
    folder = spec.folder.format_map(defaultdict(lambda: "*"))
    return sorted(root.glob(f"{folder}/{spec.stem}-*.parquet"))


def read_row_file(path: Path, schema: pa.Schema) -> pa.Table:
    """One result file, brought to a schema: absent columns null, unknown ones left out.

    Args:
        path: the file.
        schema: of the table.

    Returns:
        Its rows.

    Raises:
        BlockCorruptError: if it is damaged or foreign.
    """
    content = path.read_bytes()  # apart, so that a failing disk is not taken for a damaged file
    try:
        # ParquetFile, not read_table, which builds a data set per file.
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
            found = file.read()
        columns = [
            found[column.name].cast(column.type)
            if column.name in found.column_names
            else pa.nulls(found.num_rows, column.type)
            for column in schema
        ]
        return pa.table(columns, schema=schema)
    except (pa.ArrowException, OSError) as error:
        raise BlockCorruptError(
            f"{path}: damaged or foreign ({str(error).splitlines()[0]}). Expected a result that "
            f"raykernel wrote. Run `raykernel verify --remove`, then its configuration again."
        ) from error


def to_json(value: object) -> str:
    """Text of a value for the JSON columns: keys sorted."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _spec(table: str) -> ResultTable:
    if table not in TABLES:
        raise InputError(
            f"found table {table!r}, expected a result table; {nearest(table, TABLES)}"
        )
    return TABLES[table]
