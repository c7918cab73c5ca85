"""Statistics of scale studies against synthetic ladders whose truth is known.

The ladders are drawn here, from a formula of their own; every claim about an interval has a control that must fail.
"""

import json
import math

import numpy as np
import pytest

from megatron_depthattn.study.differences import Observation
from megatron_depthattn.study.fit import fit_study
from megatron_depthattn.study.law import fit_law

SIZES = (4e5, 9e5, 2e6, 4.5e6)
TRUTH = {"E": 2.0, "A": 1.2 * 1.5e6**0.35, "alpha": 0.35, "B": 3e7**0.3, "beta": 0.3}
STUDIES = 60


def true_loss(size, tokens, truth=TRUTH):
    return truth["E"] + truth["A"] / size ** truth["alpha"] + truth["B"] / tokens ** truth["beta"]


def ladder(rng, mus, sizes=SIZES, budgets=(10, 20, 40), seeds=3, rungs=None, **noise):
    """Runs of a baseline and of methods worth mu times its tokens, at all rungs or those of `rungs`.

    noise, in nats: shared by the methods of a cluster; own of each run; bump of a (size, budget), which no law has.
    calmer: noise falls with size to this power. carried: share of a run's own noise that its other budgets have too.
    """
    shared, own, bump, calmer, carried = (
        noise.get(name, default)
        for name, default in {"shared": 0.012, "own": 0.008, "bump": 0.0, "calmer": 0.0, "carried": 0.0}.items()
    )
    runs = []
    methods = {"vanilla": 1.0, **mus}
    for i, size in enumerate(sizes):
        scale = (sizes[0] / size) ** calmer
        initial = rng.normal(size=(seeds, len(methods)))
        for budget in budgets:
            off = bump * rng.normal()
            for seed in range(seeds):
                common = shared * rng.normal()
                for m, (method, mu) in enumerate(methods.items()):
                    mine = own * (math.sqrt(1 - carried) * rng.normal() + math.sqrt(carried) * initial[seed, m])
                    if i in (rungs or {}).get(method, range(len(sizes))):
                        loss = float(true_loss(size, mu * budget * size) + off + scale * (common + mine))
                        runs.append(Observation(f"d{i}", method, seed + 1, size, budget * size, budget, loss))
    return runs


def fit(runs, time_ratios=None, **options):
    return fit_study(runs, **{"baseline": "vanilla", "time_ratios": time_ratios or {}, "resamples": 39} | options)


def width(figure):
    return figure["high"] - figure["low"]


def shuffle_seeds(runs, rng):
    """The method's losses of each cell handed to other seeds: what is left of the study without its pairing."""
    cells = {}
    for i, run in enumerate(runs):
        if run.method != "vanilla":
            cells.setdefault((run.rung, run.tokens, run.method), []).append(i)
    shuffled = list(runs)
    for where in cells.values():
        for i, j in zip(where, np.roll(where, rng.integers(1, len(where))), strict=True):
            shuffled[i] = runs[i]._replace(loss=runs[int(j)].loss)
    return shuffled


# ------------------------------------------------------------------------------------------------ known exponents


def standard_errors(truth, sizes, tokens, noise):
    """Of the five parameters, A and B as logarithms: the Cramér-Rao bound at the truth, by finite differences."""
    point = np.array([truth["E"], math.log(truth["A"]), truth["alpha"], math.log(truth["B"]), truth["beta"]])

    def losses(p):
        return p[0] + np.exp(p[1] - p[2] * np.log(sizes)) + np.exp(p[3] - p[4] * np.log(tokens))

    steps = 1e-5 * np.eye(5)
    jacobian = np.stack([(losses(point + s) - losses(point - s)) / 2e-5 for s in steps], axis=1)
    return dict(zip(truth, noise * np.sqrt(np.diag(np.linalg.inv(jacobian.T @ jacobian))), strict=True))


TRUTHS = [
    TRUTH,
    {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28},  # Hoffmann et al. 2022
    {"E": 2.5, "A": 5000.0, "alpha": 0.6, "B": 300.0, "beta": 0.35},
]


@pytest.mark.parametrize("truth", TRUTHS, ids=["mild", "chinchilla", "steep"])
def test_known_exponents_are_recovered_from_noise(truth):
    rng = np.random.default_rng(1)
    sizes = np.repeat([4e5, 1e6, 2.5e6, 6e6, 1.5e7], 12)
    tokens = sizes * np.tile(np.repeat([5, 15, 45, 135], 3), 5)
    noise = 0.004
    errors = standard_errors(truth, sizes, tokens, noise)
    for _ in range(3):
        found = fit_law(sizes, tokens, true_loss(sizes, tokens, truth) + noise * rng.normal(size=len(sizes)))
        law = found.law._asdict()
        for name in ("E", "alpha", "beta"):
            assert abs(law[name] - truth[name]) < 4 * errors[name], name
        for name in ("A", "B"):
            assert abs(math.log(law[name] / truth[name])) < 4 * errors[name], name
        assert 0.7 * noise < found.rmse < 1.3 * noise
        # Control: another truth, with the exponents exchanged, is not within the same bounds.
        assert (
            abs(law["alpha"] - truth["beta"]) > 4 * errors["alpha"]
            or abs(law["beta"] - truth["alpha"]) > 4 * errors["beta"]
        )


def test_the_law_without_noise_is_exact_in_any_unit():
    sizes = np.repeat([4e9, 9e9, 2e10, 5e10], 3)
    tokens = sizes * np.tile([5, 20, 60], 4)
    law = fit_law(sizes, tokens, true_loss(sizes, tokens)).law._asdict()
    assert law == pytest.approx(TRUTH, rel=1e-3)


def test_a_law_that_misses_its_points_says_so_and_widens():
    rng, other = np.random.default_rng(2), np.random.default_rng(2)
    straight, bumpy = fit(ladder(rng, {})), fit(ladder(other, {}, bump=0.03))
    assert "note" not in straight["laws"]["vanilla"]
    assert "more than seeds explain" in bumpy["laws"]["vanilla"]["note"]
    widths = [width(found["held_out"]["methods"]["vanilla"][0]["predicted"]) for found in (straight, bumpy)]
    assert widths[1] > 1.5 * widths[0]


@pytest.mark.parametrize("bump", [0.0, 0.05])
def test_a_multiplier_over_a_law_that_misses_is_called_rough(bump):
    found = fit(ladder(np.random.default_rng(2), {"m": 1.2}, bump=bump))
    assert ("more than seeds explain" in found["laws"]["vanilla"].get("note", "")) == bool(bump)
    assert ("rough: its law misses its own points" in found["multipliers"]["m"]["sentence"]) == bool(bump)


# ------------------------------------------------------------------------- coverage, over many studies of known truth


@pytest.fixture(scope="module")
def many():
    return study_many(STUDIES)


def study_many(studies, sizes=SIZES, **noise):
    """(low, value, high, truth) of each figure, and the conclusions, over studies with one gain and one null method."""
    mus = {"gain": 1.2, "null": 1.0}
    # Each method at two rungs: laws of their own are not what is measured here, and cost most of the time.
    rungs = {"gain": (0, 1), "null": (1, 2)}
    figures = {name: [] for name in ("mu gain", "mu null", "mu of a rung", "difference", "held out", "exponent")}
    conclusions = []
    for study in range(studies):
        budgets = (10, 40) if study % 2 else (10, 20, 40)
        runs = ladder(np.random.default_rng(study), mus, sizes, budgets, rungs=rungs, **noise)
        found = fit(runs, seed=study)

        def note(name, figure, truth):
            figures[name].append((figure["low"], figure["value"], figure["high"], truth))

        for method, mu in mus.items():
            note(f"mu {method}", found["multipliers"][method]["equal_tokens"], mu)
            for of in found["multipliers"][method]["rungs"].values():
                note("mu of a rung", of["equal_tokens"], mu)
        size_of = {run.rung: run.size for run in runs}
        for row in found["differences"]:
            size, tokens = size_of[row["rung"]], row["tokens"]
            truth = true_loss(size, mus[row["method"]] * tokens) - true_loss(size, tokens)
            note("difference", row | {"value": row["mean"]}, truth)
        for cell in found["held_out"].get("methods", {"vanilla": []})["vanilla"]:
            note("held out", cell["predicted"], cell["measured"])
        for name in ("alpha", "beta"):
            note("exponent", found["laws"]["vanilla"][name], TRUTH[name])
        conclusions.append({method: found["multipliers"][method]["conclusion"] for method in mus})
    return figures, conclusions


def coverage(figures, scale=1.0):
    """The share of truths inside the intervals, these scaled about their value."""
    inside = [
        value - scale * (value - low) <= truth <= value + scale * (high - value) for low, value, high, truth in figures
    ]
    return float(np.mean(inside))


@pytest.mark.parametrize("name", ["mu gain", "mu null", "mu of a rung", "difference", "held out", "exponent"])
def test_intervals_cover_the_truth_at_their_rate(many, name):
    figures = many[0][name]
    assert len(figures) >= STUDIES
    assert 0.83 <= coverage(figures) <= 0.97, coverage(figures)
    # Control: intervals of half the width are too narrow.
    assert coverage(figures, scale=0.5) < 0.8


def test_a_method_without_a_difference_is_rarely_given_one(many):
    conclusions = [conclusion["null"] for conclusion in many[1]]
    assert conclusions.count("no difference shown") >= STUDIES - 16, (
        conclusions
    )  # at most 10 expected; binomial, 97.5 %
    # Control: the other method of the same studies, which has a gain, is found.
    assert sum(conclusion["gain"] == "better" for conclusion in many[1]) >= 0.95 * STUDIES


# ------------------------------------------------------------------------------------------------- what pairing buys


def test_pairing_narrows_and_shuffled_pairs_widen():
    rng = np.random.default_rng(3)
    runs = ladder(rng, {"gain": 1.2}, shared=0.03, own=0.005, rungs={"gain": (1, 2)})
    paired, unpaired = fit(runs), fit(shuffle_seeds(runs, rng))
    figures = [found["multipliers"]["gain"]["equal_tokens"] for found in (paired, unpaired)]
    assert figures[0]["low"] < 1.2 < figures[0]["high"]
    assert width(figures[1]) > 2 * width(figures[0])  # sqrt(1 + 0.03^2 / 0.005^2) = 6 in expectation
    means = [np.mean([row["high"] - row["low"] for row in found["differences"]]) for found in (paired, unpaired)]
    assert means[1] > 2 * means[0]


@pytest.mark.parametrize(("mu", "own"), [(1.05, 0.002), (1.2, 0.008), (0.9, 0.004)])
def test_true_gains_and_losses_are_found(mu, own):
    """own: each run's noise beside what it shares; a gain of 5 % is about 0.012 nats here."""
    for study in range(3):
        runs = ladder(np.random.default_rng(study), {"m": mu}, own=own, rungs={"m": (1, 2)})
        found = fit(runs)["multipliers"]["m"]
        assert found["conclusion"] == ("better" if mu > 1 else "worse")
        assert abs(math.log(found["equal_tokens"]["value"] / mu)) < 0.3 * abs(math.log(mu))
        assert found["sentence"].startswith(f"{found['conclusion']}. Held-out loss less vanilla's")


def test_one_multiplier_for_rungs_that_differ_is_not_passed_over():
    rng = np.random.default_rng(4)
    first = ladder(rng, {"m": 1.5}, own=0.003)
    second = ladder(np.random.default_rng(4), {"m": 1.05}, own=0.003)
    runs = [a if a.rung in ("d0", "d1") else b for a, b in zip(first, second, strict=True)]
    assert fit(runs)["multipliers"]["m"]["p_rungs"] < 0.05 < fit(first)["multipliers"]["m"]["p_rungs"]


# ------------------------------------------------------------------------------------------------------- equal time


def test_a_gain_that_training_longer_takes_back_is_not_passed_over():
    """Worth 1.5 times its tokens at 10 a weight and nothing at 40; the control is worth the same at all budgets."""
    rng, worth = np.random.default_rng(5), {10: 1.5, 20: 1.2, 40: 1.0}
    steady = ladder(rng, {"method": 1.2})
    fading = []
    for run in ladder(rng, {"method": 1.0}):
        mu = worth[run.tokens_per_parameter] if run.method == "method" else 1.0
        gain = true_loss(run.size, run.tokens) - true_loss(run.size, mu * run.tokens)
        fading.append(run._replace(loss=run.loss - gain))
    of = fit(fading)["multipliers"]["method"]
    found = {float(budget): at["equal_tokens"] for budget, at in of["budgets"].items()}
    assert list(found) == [10, 20, 40]
    assert all(found[budget]["low"] < mu < found[budget]["high"] for budget, mu in worth.items())
    assert of["p_budgets"] < 0.05
    assert of["conclusion"] == "faster early learning, not shown to be a better model at the end"
    control = fit(steady)["multipliers"]["method"]
    assert control["conclusion"] == "better" and control["p_budgets"] > 0.05


def test_conclusions_rest_on_differences_and_not_on_a_law_that_misses():
    """Paired differences hide what a law misses of a rung; runs of one budget a rung are judged all together."""
    bumpy = ladder(np.random.default_rng(2), {"m": 1.2, "null": 1.0}, bump=0.1)
    found = fit(bumpy)["multipliers"]
    assert (found["m"]["conclusion"], found["null"]["conclusion"]) == ("better", "no difference shown")
    assert "worth its time" not in fit(bumpy, {(f"d{i}", "m"): 1.0 for i in range(4)})["multipliers"]["m"]["sentence"]
    single = [run for run in bumpy if run.tokens_per_parameter == (10, 20, 40, 40)[int(run.rung[1])]]
    (whole,) = fit(single)["multipliers"]["m"]["budget_differences"]
    assert whole["tokens_per_parameter"] is None and whole["rungs"] == ["d0", "d1", "d2", "d3"] and whole["pairs"] == 12
    late = [run for run in bumpy if run.tokens_per_parameter > 10]
    swapped = [
        run._replace(method="null" if run.method == "m" else "m") if run.method != "vanilla" else run
        for run in bumpy
        if run.tokens_per_parameter == 10
    ]
    assert fit(late + swapped)["multipliers"]["null"]["conclusion"].startswith("faster early learning")


def test_one_pair_at_a_budget_has_no_interval_there():
    runs = ladder(np.random.default_rng(5), {"m": 1.2})
    kept = [run for run in runs if run.tokens_per_parameter < 40 or (run.rung, run.seed) == ("d1", 1)]
    budgets = fit(kept)["multipliers"]["m"]["budgets"]
    assert budgets["40"]["equal_tokens"]["low"] is None is budgets["40"]["equal_tokens"]["high"]
    assert budgets["20"]["equal_tokens"]["low"] is not None


def test_time_can_eat_a_gain_and_is_said():
    runs = ladder(np.random.default_rng(5), {"m": 1.1}, own=0.002, rungs={"m": (1, 2)})
    found = fit(runs, {("d1", "m"): 1.2, ("d2", "m"): 1.25})["multipliers"]["m"]
    ratio = math.sqrt(1.2 * 1.25)
    assert found["equal_time"]["value"] == pytest.approx(found["equal_tokens"]["value"] / ratio)
    assert found["rungs"]["d2"]["equal_time"]["value"] == pytest.approx(
        found["rungs"]["d2"]["equal_tokens"]["value"] / 1.25
    )
    assert found["conclusion"] == "better" and found["equal_time"]["high"] < 1
    assert "vanilla needs 1.1" in found["sentence"] and ": less than its time costs." in found["sentence"]
    quick = fit(runs, {("d1", "m"): 1.0, ("d2", "m"): 1.0})["multipliers"]["m"]
    even = fit(runs, {("d1", "m"): 1.1, ("d2", "m"): 1.1})["multipliers"]["m"]
    assert ": not shown to be worth its time." in even["sentence"] and ": worth its time." in quick["sentence"]


def test_a_missing_step_time_is_reported_where_it_is_needed():
    runs = ladder(np.random.default_rng(5), {"m": 1.1}, rungs={"m": (1, 2)})
    found = fit(runs, {("d1", "m"): 1.2})["multipliers"]["m"]
    assert "d2" in found["equal_time"]["reason"] and "d2" in found["sentence"]
    assert "reason" in found["rungs"]["d2"]["equal_time"]
    assert found["rungs"]["d1"]["equal_time"]["value"] > 0


# ------------------------------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_study_of_two_rungs_has_differences_and_reasons(seeds):
    found = fit(ladder(np.random.default_rng(6), {"m": 1.2}, sizes=SIZES[:2], budgets=(10, 20), seeds=seeds))
    assert len(found["differences"]) == 4
    for row in found["differences"]:
        assert len(row["pairs"]) == seeds
        assert (row["low"] is None) == (seeds == 1)
    for entry in (*found["laws"].values(), found["held_out"], found["multipliers"]["m"]):
        assert "add" in entry["reason"]
    json.dumps(found, allow_nan=False)


def test_three_rungs_have_a_law_and_no_held_out_rung():
    found = fit(ladder(np.random.default_rng(6), {"m": 1.2}, sizes=SIZES[:3]))
    assert "2 sizes where A/N^alpha beside E needs 3: add rungs" in found["held_out"]["reason"]
    assert found["multipliers"]["m"]["equal_tokens"]["value"] > 1


def test_one_rung_alone_or_one_method_alone_does_not_crash():
    runs = ladder(np.random.default_rng(6), {"m": 1.2})
    one = fit([run for run in runs if run.rung == "d0"])
    assert "reason" in one["laws"]["vanilla"] and "reason" in one["held_out"]
    alone = fit([run for run in runs if run.method == "vanilla"])
    assert alone["multipliers"] == {} and alone["differences"] == []


def test_a_baseline_that_tokens_do_not_help_has_no_multipliers():
    rng = np.random.default_rng(7)
    flat = TRUTH | {"B": 1e-9}
    runs = [
        run._replace(loss=float(true_loss(run.size, run.tokens, flat) + 0.01 * rng.normal()))
        for run in ladder(rng, {"m": 1.2}, rungs={"m": (1, 2)})
    ]
    assert "does not fall with tokens" in fit(runs)["multipliers"]["m"]["reason"]


def test_a_method_below_the_floor_has_no_multiplier():
    runs = [
        run._replace(loss=run.loss - 1.5) if run.method == "m" else run
        for run in ladder(np.random.default_rng(8), {"m": 1.0}, rungs={"m": (1, 2)})
    ]
    found = fit(runs)
    assert "any number of tokens" in found["multipliers"]["m"]["reason"]
    assert all(row["high"] < -1 for row in found["differences"])


def test_unfinished_and_unequal_runs_are_paired_where_they_can_be():
    runs = ladder(np.random.default_rng(9), {"m": 1.2, "n": 1.0, "lost": 1.0}, rungs={"n": (1,), "lost": (2,)})
    gone = {("d0", "vanilla", 1), ("d0", "m", 2), ("d3", "m", 1), ("d3", "m", 2), ("d2", "m", 3)}
    runs = [run for run in runs if (run.rung, run.method, run.seed) not in gone]
    runs = [run for run in runs if run.method != "n" or (run.seed == 1 and run.tokens_per_parameter == 10)]
    runs = [run._replace(seed=run.seed + 100) if run.method == "lost" else run for run in runs]
    found = fit(runs, resamples=59)
    rows = {(row["rung"], row["tokens_per_parameter"], row["method"]): row for row in found["differences"]}
    assert [pair["seed"] for pair in rows["d0", 10, "m"]["pairs"]] == [3] and rows["d0", 10, "m"]["low"] is None
    assert len(rows["d2", 10, "m"]["pairs"]) == 2 and len(rows["d1", 10, "m"]["pairs"]) == 3
    assert found["multipliers"]["m"]["equal_tokens"]["low"] < 1.2 < found["multipliers"]["m"]["equal_tokens"]["high"]
    single = found["multipliers"]["n"]
    assert single["equal_tokens"]["low"] is None and single["conclusion"] == "no difference shown"
    assert "One seed does not show its noise" in single["sentence"]
    assert "shares rung, budget and seed" in found["multipliers"]["lost"]["reason"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda runs: [runs[1]._replace(tokens=5.0), *runs], "give its methods one batch"),
        (lambda runs: [run for run in runs if run.method != "vanilla"], "no finished run of the baseline"),
        (lambda runs: [], "no finished run of the baseline"),
    ],
)
def test_observations_that_contradict_are_an_error(change, said):
    with pytest.raises(ValueError, match=said):
        fit(change(ladder(np.random.default_rng(0), {"m": 1.0}, sizes=SIZES[:2])))


def test_too_few_resamples_are_an_error():
    with pytest.raises(ValueError, match="at least"):
        fit(ladder(np.random.default_rng(0), {}), resamples=18)


# ------------------------------------------------------------------------------------ the file, and many conclusions


def test_the_answer_is_plain_json_and_the_seed_decides():
    runs = ladder(np.random.default_rng(10), {"m": 1.2, "n": 1.0}, rungs={"n": (1,)})
    times = {(f"d{i}", m): 1.05 for i in range(4) for m in "mn"}
    found = fit(runs, times, seed=3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert fit(runs[::-1], times, seed=3) == found  # whatever order the runs come in
    assert fit(runs, times, seed=4) != found
    assert set(found) == {
        *("baseline", "confidence", "resamples", "num_observations", "form"),
        *("laws", "held_out", "differences", "multipliers"),
    }
    assert found["num_observations"] == len(runs) and found["laws"]["n"]["reason"]
    assert [cell["tokens"] for cell in found["held_out"]["methods"]["m"]] == [4.5e7, 9e7, 1.8e8]


def test_many_methods_without_a_difference_rarely_leave_any_conclusion():
    """Five methods at once: their conclusions hold together, as a study's reader looks at the best of them."""
    methods = {f"m{i}": 1.0 for i in range(5)}
    false = corrected = 0
    for study in range(40):
        runs = ladder(np.random.default_rng(study), methods, sizes=SIZES[:2], rungs=dict.fromkeys(methods, (1,)))
        found = fit(runs, seed=study)["multipliers"].values()
        corrected += any(of["conclusion"] != "no difference shown" for of in found)
        ends = [of["budget_differences"][which] for of in found for which in (0, -1)]
        false += any(not end["low"] < 0 < end["high"] for end in ends)
    assert corrected <= 8, corrected  # 4 expected; binomial, 97.5 %
    assert false > corrected  # control: uncorrected intervals would have spoken more often
