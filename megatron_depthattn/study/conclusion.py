"""What a study says of a method: a conclusion from its paired differences alone, and a sentence that leads with it.

The differences of a token budget are averaged over its rungs; the noise is that of seeds within rungs. Where rungs were
trained on several budgets, the smallest says whether a method learns faster at first and the largest whether it is
better at the end: both conclusions of all methods hold together at the study's confidence (Bonferroni). The law of the
baseline, and with it the multiplier, decides nothing here.
"""

from collections.abc import Mapping
from typing import Any

from megatron_depthattn.study.differences import Clusters, mean_difference


def budget_differences(clusters: Clusters, baseline: str, method: str, confidence: float) -> list[dict[str, Any]]:
    """Mean paired difference over rungs, by token budget; of all pairs at once where no rung has two budgets."""
    ran, difference = clusters.ran(baseline, method), clusters.losses[method] - clusters.losses[baseline]
    groups: dict[Any, Any] = {None: ran} if ran.any() else {}
    if any(len(clusters.by_budget(of)) > 1 for of in clusters.by_rung(ran).values()):
        groups = clusters.by_budget(ran)
    found = []
    for budget, here in groups.items():
        parts = {rung: difference[of] for rung, of in clusters.by_rung(here).items()}
        entry = {"tokens_per_parameter": budget, "rungs": [*parts], "pairs": int(here.sum())}
        found.append(entry | mean_difference([*parts.values()], confidence))
    return found


def conclusion(clusters: Clusters, baseline: str, method: str, confidence: float, num_methods: int) -> str:
    """In words, from the differences at the smallest and at the largest budget."""
    looks = 2 if len(budget_differences(clusters, baseline, method, confidence)) > 1 else 1
    corrected = 1 - (1 - confidence) / (looks * num_methods)
    differences = budget_differences(clusters, baseline, method, corrected)
    if not differences:
        return "no pairs"
    early, late = (_sign(differences[which]) for which in (0, -1))
    if late:
        end, other = ("better", "slower") if late < 0 else ("worse", "faster")
        return end if early in (0, late) else f"{other} early learning, but {end} at the end"
    if not early:
        return "no difference shown"
    pace, end = ("faster", "better") if early < 0 else ("slower", "worse")
    return f"{pace} early learning, not shown to be a {end} model at the end"


def _sign(difference: Mapping[str, Any]) -> int:
    """Of the whole interval; 0 where it holds 0 or there is none."""
    low, high = difference["low"], difference["high"]
    return 0 if low is None else -1 if high < 0 else 1 if low > 0 else 0


def sentence(found: Mapping[str, Any], baseline: str, confidence: float, law_misses: bool) -> str:
    """The conclusion, the differences, what they are worth in tokens and in time, for who sees nothing else.

    Args:
        found: of the method in fit.json: conclusion, budget_differences, and equal_tokens, equal_time or reason.
        law_misses: the baseline's law misses its own points, so nothing is decided by it.
    """
    parts = [f"{found['conclusion']}."]
    if differences := found["budget_differences"]:
        each = ", ".join(_difference(entry) for entry in differences)
        parts.append(f"Held-out loss less {baseline}'s, nats [{100 * confidence:g} % interval]: {each}.")
        if all(entry["low"] is None for entry in differences):
            parts.append("One seed does not show its noise: add seeds.")
    if "reason" in found:
        return " ".join([*parts, f"Its worth in tokens is not known: {found['reason']}."])
    rough, timed = " (rough: its law misses its own points)" if law_misses else "", found["equal_time"]
    parts.append(f"{baseline} needs {_times(found['equal_tokens'])} the tokens for the same loss{rough}.")
    if "reason" in timed:
        return " ".join([*parts, f"Equal wall time: {timed['reason']}."])
    worth = "" if law_misses else ": not shown to be worth its time"
    if not law_misses and timed["low"] is not None and timed["low"] > 1:
        worth = ": worth its time"
    elif not law_misses and timed["high"] is not None and timed["high"] < 1:
        worth = ": less than its time costs"
    ratio = found["equal_tokens"]["value"] / timed["value"]
    parts.append(f"A token takes {ratio:.2f} × as long; at equal wall time {_times(timed)} is left{worth}.")
    return " ".join(parts)


def _difference(entry: Mapping[str, Any]) -> str:
    text, rungs = f"{entry['mean']:+.3f}{bounds(entry, '+.3f')}", ", ".join(entry["rungs"])
    budget = entry["tokens_per_parameter"]
    return f"{text} at {rungs}" if budget is None else f"{text} at {per_weight(budget)} ({rungs})"


def _times(figure: Mapping[str, Any]) -> str:
    return f"{figure['value']:.2f} ×{bounds(figure, '.2f')}"


def per_weight(budget: float | str) -> str:
    """'1 token per weight', '2 tokens per weight'."""
    return f"{float(budget):g} token{'' if float(budget) == 1 else 's'} per weight"


def bounds(entry: Mapping[str, Any], form: str) -> str:
    """' [low, high]'; empty where there is no interval, 'open' for an end that is."""
    low, high = (entry.get(end) for end in ("low", "high"))
    if low is None and high is None:
        return ""
    return " [{}, {}]".format(*("open" if end is None else format(end, form) for end in (low, high)))
