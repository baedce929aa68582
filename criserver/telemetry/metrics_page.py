"""The tables of docs/metrics.md: ``python -m criserver.telemetry.metrics_page`` prints them."""

from __future__ import annotations

from criserver.telemetry.families import TABLE


def rows() -> list[str]:
    """The table of all families in Markdown, a line each."""
    lines = ["| name | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for family in TABLE:
        limits = {name: f" (at most {most} values)" for name, most in family.bounded.items()}
        labels = ", ".join(f"`{name}`{limits.get(name, '')}" for name in family.labels)
        lines.append(f"| `{family.name}` | {family.kind} | {labels} | {family.text} |")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
