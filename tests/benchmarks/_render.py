"""Tables in Markdown, for the screen and for docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Contestants as lines, models and shapes as columns; below them the ratios with their limits."""
    head = [
        ", ".join(value if key == "model" else f"{key}={value}" for key, value in r["label"].items()) for r in results
    ]
    lines = [["", *head], ["---", *["---:"] * len(head)]]
    contestants = dict.fromkeys(name for r in results for name in r["ms"])
    lines += [[name, *(_cell(name, r) for r in results)] for name in contestants]
    for name in dict.fromkeys(name for r in results for name in r["ratios"]):
        ratio = next(r["ratios"][name] for r in results if name in r["ratios"])
        lines.append([f"**{name}**{_limit(ratio)}", *(_ratio(r["ratios"].get(name)) for r in results)])
    lines.append(["rounds", *(str(r["rounds"]) for r in results)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(results: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> dict[str, str]:
    """One block a benchmark; a table a model where the shapes of one model fill it."""
    blocks = {}
    for name in titles:
        mine = [r for r in results if r["table"] == name]
        models = dict.fromkeys(r["label"]["model"] for r in mine)
        groups = [[r for r in mine if r["label"]["model"] == m] for m in models] if len(mine) > 4 else [mine]
        if mine:
            blocks[name] = "\n\n".join(table(group) for group in groups)
    return blocks


def machine(environment: Mapping[str, Any]) -> str:
    """One sentence about what the numbers depend on."""
    e = environment
    cores = f"{e['threads']} CPU cores, " if e["kind"] == "cpu" else ""
    return (
        f"Measured on {cores}{e['device']}, torch {e['torch']}, Python {e['python']}, {e['threads']} threads, seed "
        f"{e['seed']}."
    )


def write(page: Path, blocks: Mapping[str, str]) -> None:
    """Replaces what stands between the markers ``<!-- NAME -->`` and ``<!-- end NAME -->``."""
    text = page.read_text()
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{page} has no markers {start} ... {end}; expected both.")
        text = f"{before}{start}\n\n{block}\n\n{end}{after}"
    page.write_text(text)


def _cell(name: str, result: Mapping[str, Any]) -> str:
    ms = result["ms"].get(name)
    if ms is None:
        return ""
    words = [f"{_short(ms['median'])} [{_short(ms['low'])}, {_short(ms['high'])}] ms"]
    if name in result["mib"]:
        words.append(f"{_short(result['mib'][name])} MiB")
    if name in result.get("residuals", {}):
        words.append(f"off by {result['residuals'][name]:.0e}")
    return ", ".join(words)


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return ""
    limited = ratio["at_most"] is not None or ratio["at_least"] is not None
    verdict = "" if not limited else " met" if ratio["met"] else " **missed**"
    spread = "" if ratio["low"] == ratio["high"] else f" [{_short(ratio['low'])}, {_short(ratio['high'])}]"
    return f"{_short(ratio['median'])}{spread}{verdict}"


def _limit(ratio: Mapping[str, Any]) -> str:
    for key, sign in (("at_most", "≤"), ("at_least", "≥")):
        if ratio[key] is not None:
            return f", to be {sign} {ratio[key]:g}"
    return ""


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.2f}"
