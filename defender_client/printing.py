"""What the commands print: plans, costs before they are spent, certificates, audits, attacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from defender_client.attack import Summary
from defender_client.attack_reconstruction import Summary as ReconstructionSummary
from defender_client.audit import Audit
from defender_client.certify import certified_accuracy, cost
from defender_client.demo import DemoResult
from defender_client.jobs import Attacked, Certified
from defender_client.offline_audit import LedgerAudit
from defender_client.plan import AttackPlan, Plan
from defender_client.query_log import QueryLog
from defender_client.replay import described
from defender_client.report import RADII
from defender_client.sources import RecordedRun, Source
from defender_client.terminal import console, errors
from shared.models.manifest import MANIFEST_FILE, Manifest

_SAME_CLASSIFIER = 0.99  # of a white box that is the oracle's own, but for float rounding


def print_json(value: Mapping[str, Any] | list[Any]) -> None:
    """One JSON value."""
    console.print_json(json.dumps(value))


def plan_as_json(planned: Plan) -> dict[str, Any]:
    """A plan and its sums."""
    return asdict(planned) | {"to_train": planned.to_train, "total": planned.total}


def certified_as_json(certified: Certified) -> dict[str, Any]:
    """What a certification came to; accuracies in 0..1 by radius."""
    return {
        "path": str(certified.path),
        "images": len(certified.rows),
        "abstained": _abstained(certified),
        "queries": certified.spent,
        "certified_accuracy": {f"{r:.2f}": certified_accuracy(certified.rows, r) for r in _radii(certified)},
        "settings": certified.settings.model_dump(),
    }


def print_certified(certified: Certified) -> None:
    """Certified accuracy by radius, and what it cost."""
    table = Table("radius", "certified accuracy", box=None)
    for radius in _radii(certified):
        table.add_row(f"{radius:.2f}", f"{certified_accuracy(certified.rows, radius):.3f}")
    console.print(table)
    images = len(certified.rows)
    console.print(f"{images} images, {_abstained(certified)} abstained, {certified.spent:,} queries, {certified.path}")
    if certified.settings.method == "sequential" and images:
        each = sum(row.queries or 0 for row in certified.rows) / images
        console.print(f"sequential: {each:,.0f} queries an image, at most {cost(certified.settings)[1]:,}")


def _radii(certified: Certified) -> tuple[float, ...]:
    return tuple(certified.settings.radii if certified.settings.method == "sequential" else RADII)


def _abstained(certified: Certified) -> int:
    return sum(row.predict == -1 for row in certified.rows)


def demo_as_json(result: DemoResult) -> dict[str, Any]:
    """What the demo came to; accuracies in 0..1."""
    accuracies = {f"{r:.2f}": {"undefended": u, "defended": d} for r, (u, d) in result.accuracies.items()}
    audited = asdict(result.audit) | {"equal": result.audit.equal}
    return {"certified_accuracy": accuracies, "audit": audited, "report": str(result.report)}


def print_demo(result: DemoResult) -> None:
    """Accounts, certified accuracies, and where the report is."""
    print_audit(result.audit)
    table = Table("radius", "undefended", "defended", box=None)
    for radius, (undefended, defended) in result.accuracies.items():
        table.add_row(f"{radius:.2f}", f"{undefended:.3f}", f"{defended:.3f}")
    console.print("certified accuracy")
    console.print(table)
    console.print(f"report in {result.report}")


def attack_as_json(attacked: Attacked) -> dict[str, Any]:
    """What an attack came to."""
    settings = attacked.settings.model_dump()
    return asdict(attacked.summary) | {"settings": settings, "path": str(attacked.path)}


def print_audit(result: Audit) -> None:
    """The three accounts beside each other, and the verdict."""
    table = Table("account", "queries", box=None)
    for purpose, queries in sorted(result.purposes.items()):
        table.add_row(f"  client, {purpose}", f"{queries:,}")
    table.add_row("client's logs", f"{result.logged:,}")
    table.add_row("server's ledger", f"{result.ledger:,}")
    table.add_row("server's budget statement", f"{result.statement:,}")
    table.add_row("server's metrics", "-" if result.metrics is None else f"{result.metrics:,}")
    console.print(table)
    if result.lost:
        console.print(f"{result.lost} requests were charged and their answer lost")
    if result.key_from:
        console.print(f"{result.receipts:,} receipts are good, by the key {result.key_from}")
    for difference in result.differences:
        console.print(f"differs: {difference}")
    console.print(
        f"audit: {'equal' if result.equal else 'NOT EQUAL'} ({result.requests:,} requests of client '{result.client}', "
        f"budget {result.budget:,})"
    )


def print_ledger_audit(result: LedgerAudit) -> None:
    """The accounts of an exported ledger, what the runs say, and the verdict."""
    table = Table("client", box=None)
    for column in ("requests", "queries", "in flight", "budget"):
        table.add_column(column, justify="right")
    for client in result.clients:
        numbers = (client.requests, client.spent, client.held, client.budget)
        name = f"{client.client} (revoked)" if client.revoked else client.client
        table.add_row(escape(name), *(f"{number:,}" for number in numbers))
    console.print(table)
    for purpose, queries in sorted(result.purposes.items()):
        console.print(f"runs, {purpose}: {queries:,} queries", markup=False)
    if result.purposes:
        console.print(
            f"{result.receipts:,} receipts stand in the ledger; {result.without_receipt:,} requests have none"
        )
    for difference in result.differences:
        console.print(f"differs: {difference}", markup=False)
    hidden = f", {result.hidden:,} of them of others and left out" if result.hidden else ""
    console.print(
        f"audit: {'equal' if result.equal else 'NOT EQUAL'} (ledger {result.ledger}, {result.entries:,} entries"
        f"{hidden}, its end of {result.at or 'no time'}, checked with key {result.public_key[:16]}...)"
    )


def print_any_audit(result: Audit | LedgerAudit, runs: list[Path]) -> None:
    """An audit, of whichever kind."""
    if isinstance(result, LedgerAudit):
        print_ledger_audit(result)
    else:
        print_audit(result)
        print_replayed(runs)


def print_exported(manifest: Manifest, out: Path) -> None:
    """The files of an export in `out`."""
    for name, entry in manifest.files.items():
        console.print(f"{out / name}: {show_bytes(entry.bytes)}, SHA-256 {entry.sha256}")
    console.print(f"{out / MANIFEST_FILE}: {manifest.total_queries:,} queries spent, sigma {manifest.sigma:g}")


def _most(*least: int | None) -> str:
    """What stands before a number of queries that is an upper bound."""
    return "at most " if any(bound is not None for bound in least) else ""


def print_plan(planned: Plan) -> None:
    """Queries by purpose, bytes and time."""
    table = Table("", "queries", box=None)
    table.add_row("noise floor", f"{planned.noise:,}")
    table.add_row("oracle labels", f"{planned.labels:,}")
    table.add_row("training", f"{_most(planned.least_training)}{planned.training:,}")
    table.add_row("validation", f"{planned.validation:,}")
    table.add_row("certification", f"{_most(planned.least)}{planned.certification:,}")
    table.add_row("total", f"{_most(planned.least, planned.least_training)}{planned.total:,}")
    table.add_row("budget left", "none kept" if planned.remaining is None else f"{planned.remaining:,}")
    console.print(table)
    console.print(f"bytes: {show_bytes(planned.bytes_up)} up, {show_bytes(planned.bytes_down)} down")
    if planned.seconds is None:
        console.print("training time: not known before the oracle's first answers")
    else:
        console.print(f"training time: about {timedelta(seconds=round(planned.seconds))}, at the oracle's rate so far")
    if planned.remaining is not None and planned.to_train <= planned.remaining < planned.total:
        console.print("the budget covers the training, but not the certification after it")


def show_bytes(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def announcing(what: str, source: Source) -> Callable[[Plan], None]:
    """Says what a job (`run` or `certification`) will cost; of a replay, that it will not."""

    def announce(planned: Plan) -> None:
        queries = planned.to_train if what == "run" else planned.certification
        most = _most(planned.least_training if what == "run" else planned.least)
        if isinstance(source, RecordedRun):
            errors.print(
                f"this {what} takes {most}{queries:,} answers from the recording in {source.run}: zero queries"
            )
            missing = source.unrecorded()
            if missing:
                errors.print(f"that recording is partial: answered requests are not in it ({described(missing)})")
        elif queries:
            left = "no budget" if planned.remaining is None else f"{planned.remaining:,} left"
            errors.print(f"this {what} will spend {most}{queries:,} more queries ({left})")

    return announce


def print_replayed(runs: list[Path]) -> None:
    """Which of the runs took answers from a recording."""
    for run in runs:
        rows = QueryLog.of_run(run).replayed_rows
        if rows:
            console.print(f"{run} was replayed: {rows:,} answers from a recording, at zero queries")


def announcing_attack(source: Source) -> Callable[[AttackPlan], None]:
    """Says what an attack may cost; of a replay, that it will not."""

    def announce(planned: AttackPlan) -> None:
        if isinstance(source, RecordedRun):
            errors.print(f"this attack takes its answers from the recording in {source.run}: zero queries")
        elif planned.queries:
            left = "no budget" if planned.remaining is None else f"{planned.remaining:,} left"
            errors.print(f"this attack will spend at most {planned.queries:,} queries ({left})")

    return announce


def print_attack(attacked: Attacked) -> None:
    """What an attack came to, and where its rows are."""
    found = attacked.summary
    if isinstance(found, Summary):
        _print_attacked_classes(found)
    else:
        _print_attacked_images(found)
    settings = attacked.settings
    how = f"{settings.copies} noisy draws an answer" if settings.copies else "without noise"
    console.print(f"{settings.name}, {how}, seed {settings.seed}: {attacked.path}")


def _print_attacked_classes(found: Summary) -> None:
    table = Table("images", "clean accuracy", "under attack", "mean l2 norm", "queries", box=None)
    numbers = (found.clean_accuracy, found.accuracy, found.mean_norm)
    table.add_row(f"{found.images:,}", *map(_decimals, numbers), f"{found.queries:,}")
    console.print(table)
    if found.agreement is not None:
        console.print(f"the white box names the oracle's class for {found.agreement:.1%} of the clean draws")
        if found.agreement < _SAME_CLASSIFIER:
            console.print("so it is another classifier, and this attack a transfer: the oracle may be easier to fool")


def _print_attacked_images(found: ReconstructionSummary) -> None:
    table = Table("images", "", "RMSE", "SSIM", "mean l2 norm", "queries", box=None)
    table.add_row(f"{found.images:,}", "clean", _decimals(found.rmse), _decimals(found.ssim), "-", f"{found.queries:,}")
    under = (found.attacked_rmse, found.attacked_ssim, found.mean_norm)
    table.add_row("", "under attack", *map(_decimals, under), "")
    console.print(table)


def _decimals(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"
