"""The table, and the ratios of its rows."""

from __future__ import annotations

from typing import Any

COLD_GOAL = 0.03


def report(rows: list[dict[str, Any]], gaps: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Print the table and its ratios, and return the ratios.

    Args:
        rows: see `timing.rows_of`.
        gaps: gaps of log-probability, by model, then by engine and variant.
    """
    by_key = {(row["model"], row["workload"], row["engine"], row["variant"]): row for row in rows}
    print(
        f"\n{'model':<7}{'workload':<14}{'engine':<9}{'variant':<8}{'ttft ms':>9}{'p95 ms':>9}{'total s':>9}{'hit':>7}"
        f"{'ttft gain':>11}{'total gain':>12}"
    )
    for row in rows:
        print(
            f"{row['model']:<7}{row['workload']:<14}{row['engine']:<9}{row['variant']:<8}{row['ttft_ms']:>9.1f}"
            f"{row['ttft_p95_ms']:>9.1f}{row['total_s']:>9.3f}{row['hit_rate']:>7.0%}{row['ttft_gain']:>10.2f}x"
            f"{row['total_gain']:>11.2f}x"
        )
    print()
    cold: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for (model, workload, engine, variant), row in by_key.items():
        where = {"model": model, "workload": workload}
        if variant == "cold":
            off = by_key[model, workload, engine, "off"]
            cost, ttft = row["total_s"] / off["total_s"] - 1, row["ttft_ms"] / off["ttft_ms"] - 1
            pairs = row["pair_cost"]
            cold.append(
                {
                    **where,
                    "engine": engine,
                    "cold_cost": round(cost, 4),
                    "cold_cost_median_of_pairs": pairs,
                    "cold_ttft_cost": round(ttft, 4),
                }
            )
            goal = "" if engine != "lamella" else f"; goal {COLD_GOAL:.0%}: {'met' if pairs <= COLD_GOAL else 'MISSED'}"
            print(
                f"cold cost, {model} {workload} {engine}: {cost:+.1%} of total time (median of pairs {pairs:+.1%}), "
                f"{ttft:+.1%} of ttft{goal}"
            )
    for (model, workload, engine, variant), row in by_key.items():
        peer = by_key.get((model, workload, "vllm", variant))
        if engine == "lamella" and peer:
            ttft, total = row["ttft_ms"] / peer["ttft_ms"], row["total_s"] / peer["total_s"]
            where = {"model": model, "workload": workload, "variant": variant}
            ratios.append({**where, "ttft": round(ttft, 3), "total": round(total, 3)})
            print(f"lamella / vllm, {model} {workload} {variant}: ttft {ttft:.2f}, total {total:.2f}")
    for model, some in gaps.items():
        for name, gap in some.items():
            print(f"{model}, {name}: chosen tokens within {gap:.3f} logprob of the fp32 forward's best")
    return {"cold_cost": cold, "lamella_over_vllm": ratios}
