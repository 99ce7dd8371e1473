"""The plan: what each preset's stages are, and that everything at a step follows from the plan, the samples, the seed and the step."""

import itertools
import math
import random
from collections import Counter

import pytest

from fastkd.plan import Plan, PlanError, Ramp, Samples, Stage, difference
from fastkd.presets import PRESETS, TRAINING, clpd, curriculum, kd, make_plan, pocl, progressive, sft


def table(n: int, seed: int = 0, scored: bool = True) -> Samples:
    generator = random.Random(seed)
    lengths = [generator.randint(3, 60) for _ in range(n)]
    scores = [round(generator.random(), 3) for _ in range(n)] if scored else None
    return Samples([f"s{i}" for i in range(n)], lengths, [length - 2 for length in lengths], scores)


def schedule(plan: Plan, n: int = 103, batch_size: int = 8, seed: int = 0, **filling):
    filling = {"teachers": ["weak", "strong"], "epochs": 2, **filling}
    return plan.filled(**filling).schedule(table(n), batch_size=batch_size, seed=seed)


def test_pocl_is_the_released_recipe():
    """papers.md, from the authors' code: each = int(N / 4); stage s has the first (s + 1) * each samples, the last one all."""
    run = schedule(pocl(), n=1003, batch_size=64, teachers=["teacher"])
    rows = run.table()
    assert [row["samples"] for row in rows] == [250, 500, 750, 1003]
    assert [row["epochs"] for row in rows] == [8, 8, 8, 8]
    assert [row["temperature"] for row in rows] == [1.0, 1.33, 1.67, 2.0]
    assert [row["kd_ratio"] for row in rows] == [0.7, 0.8, 0.9, 1.0]
    assert [row["steps"] for row in rows] == [8 * math.ceil(n / 64) for n in (250, 500, 750, 1003)]
    assert all(row["reset_optimizer"] and row["restart_lr"] and row["teacher"] == "teacher" for row in rows)
    assert [start for start, _ in run.segments] == run.starts
    ranked = run.samples.ranked()
    for i, size in enumerate((250, 500, 750, 1003)):
        assert set(run.pool(i)) == set(ranked[:size])
    # A sample of the easiest quarter is visited 32 times, one of the hardest 8 times.
    visits = Counter(position for step in range(run.total_steps) for position in run.batch(step))
    assert {visits[p] for p in ranked[:250]} == {32}
    assert {visits[p] for p in ranked[750:]} == {8}
    assert sum(visits.values()) == 8 * (250 + 500 + 750 + 1003)
    training = TRAINING["pocl"]
    assert (training["learning_rate"], training["lr_scheduler_kwargs"]["min_lr"], training["warmup_steps"]) == (1e-4, 1e-7, 0)
    assert (training["weight_decay"], training["max_grad_norm"], training["optim"]) == (1e-2, 1.0, "adamw_torch")


def test_pocls_numbers_are_open():
    rows = schedule(pocl(buckets=3, epochs=[1, 2, 3], cumulative=False, reset_optimizer=False), n=90).table()
    assert [row["samples"] for row in rows] == [30, 30, 30]
    assert [row["temperature"] for row in rows] == [1.0, 1.5, 2.0]
    assert [row["kd_ratio"] for row in rows] == [0.7, 0.85, 1.0]
    assert [row["epochs"] for row in rows] == [1, 2, 3]
    assert not any(row["reset_optimizer"] for row in rows)
    assert schedule(pocl(fractions=[0.1, 0.9], kd_ratio=0.5)).table()[1]["kd_ratio"] == 0.5


def test_clpd_aligns_teachers_and_buckets():
    run = schedule(clpd(teachers=2, fractions=[0.3, 0.7]), n=100)
    rows, ranked = run.table(), run.samples.ranked()
    assert [(row["teacher"], row["samples"]) for row in rows] == [("weak", 30), ("strong", 70)]
    assert run.pool(0) == ranked[:30]
    assert run.pool(1) == ranked[30:]
    assert run.segments == [(0, run.total_steps)]
    three = schedule(clpd(teachers=["c", "a", "b"], cumulative=True), teachers=["a", "b", "c"])
    assert [row["teacher"] for row in three.table()] == ["c", "a", "b"]
    assert three.pools[2] == 103


def test_the_other_presets():
    assert [row["teacher"] for row in schedule(progressive(teachers=2)).table()] == ["weak", "strong"]
    assert not progressive(teachers=2).needs_scores
    rows = schedule(curriculum(buckets=3)).table()
    assert [row["samples"] for row in rows] == [34, 68, 103]
    assert {row["teacher"] for row in rows} == {"strong"}
    one = schedule(sft(), teachers=[]).at(0)
    assert (one.teacher, one.kd_ratio) == (None, 0.0)
    assert schedule(make_plan("pretrain"), kd_ratio=1.0).at(0).kd_ratio == 0.5
    assert schedule(make_plan({"preset": "pretrain", "kd_ratio": 0.2, "steps": 7})).total_steps == 7
    assert schedule(kd(), kd_ratio=0.3, temperature=3.0).at(0).kd_ratio == 0.3
    assert set(PRESETS) == {"kd", "sft", "curriculum", "progressive", "pocl", "clpd", "pretrain"}


@pytest.mark.parametrize("order", ["shuffled", "sequential", "sorted", "by_length"])
@pytest.mark.parametrize("remainder", ["short", "drop"])
def test_batches_cover_their_stage_and_never_straddle(order, remainder):
    plan = curriculum(buckets=4, epochs=[1, 2, 1, 3], order=order, remainder=remainder, cumulative=False)
    run = schedule(plan, n=211, batch_size=8)
    for i, start in enumerate(run.starts):
        end = [*run.starts[1:], run.total_steps][i]
        per_epoch = (end - start) // [1, 2, 1, 3][i]
        pool = set(run.pool(i))
        for epoch in range([1, 2, 1, 3][i]):
            batches = [run.batch(step) for step in range(start + epoch * per_epoch, start + (epoch + 1) * per_epoch)]
            seen = [position for batch in batches for position in batch]
            assert len(seen) == len(set(seen))
            assert set(seen) <= pool
            assert all(len(batch) == 8 for batch in batches[:-1])
            assert len(seen) == (len(pool) if remainder == "short" else len(pool) // 8 * 8)


def test_orders():
    n, ranked = 512, table(512).ranked()
    batches = {order: schedule(kd(order=order, epochs=1), n=n) for order in ("shuffled", "sequential", "sorted", "by_length")}
    flat = {order: [p for step in range(64) for p in run.batch(step)] for order, run in batches.items()}
    assert flat["sorted"] == ranked
    assert flat["sequential"] == list(range(n))
    assert flat["shuffled"] not in (ranked, flat["sequential"])
    lengths = table(n).lengths

    def padding(order: list[int]) -> int:
        return sum(8 * max(lengths[p] for p in order[i : i + 8]) - sum(lengths[p] for p in order[i : i + 8]) for i in range(0, n, 8))

    assert padding(flat["by_length"]) < padding(flat["shuffled"]) / 2
    # Each epoch has its own order, each seed too, and another run the same.
    two = schedule(kd(epochs=2), n=n)
    assert [two.batch(s) for s in range(64)] != [two.batch(s) for s in range(64, 128)]
    assert two.batch(0) != schedule(kd(epochs=2), n=n, seed=1).batch(0)
    again = schedule(kd(epochs=2), n=n)
    assert [again.batch(s) for s in reversed(range(128))][::-1] == [two.batch(s) for s in range(128)]


def test_micro_batches_are_the_batch_on_any_number_of_processes():
    run = schedule(kd(epochs=1), n=27, batch_size=8)
    for size, accumulation, processes in ((8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2)):
        for step in range(run.total_steps):
            parts = [
                run.micro_batch(step, micro, process=process, processes=processes, size=size)
                for micro in range(accumulation)
                for process in range(processes)
            ]
            assert sorted(p for part in parts for p in part) == sorted(run.batch(step))
            lengths = [run.samples.lengths[p] for part in parts for p in part]
            assert lengths == sorted(lengths, reverse=True), "alike within a micro-batch"
    assert run.micro_batch(3, 1, process=0, processes=1, size=4) == []  # three rows are left: one micro-batch of them


def test_ramps():
    stage = Stage(steps=5, temperature=Ramp(1.0, 3.0), kd_ratio=Ramp(0.0, 1.0, "cosine", "run"), parameters={"beta": Ramp(0.1, 0.9)})
    run = schedule(Plan((stage, Stage(steps=6, temperature=4.0, kd_ratio=Ramp(0.0, 1.0, "cosine", "run")))))
    assert [run.at(s).temperature for s in range(6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    ratios = [run.at(s).kd_ratio for s in range(11)]
    assert ratios == pytest.approx([(1 - math.cos(math.pi * s / 10)) / 2 for s in range(11)])
    assert (ratios[0], ratios[-1]) == (0.0, 1.0)
    assert run.at(2).parameters == {"beta": pytest.approx(0.5)}
    assert run.at(99).temperature == 4.0
    only = schedule(Plan((Stage(steps=1, temperature=Ramp(1.0, 2.0)),)))
    assert only.at(0).temperature == 1.0


def test_segments_and_epochs():
    plan = Plan((Stage(epochs=1), Stage(epochs=0.5, restart_lr=True), Stage(epochs=1)))
    run = schedule(plan, n=80)
    assert (run.starts, run.total_steps) == ([0, 10, 15], 25)
    assert run.segments == [(0, 10), (10, 15)]
    assert [run.segment(s) for s in (0, 9, 10, 24, 99)] == [(0, 10), (0, 10), (10, 15), (10, 15), (10, 15)]
    assert [run.epochs(s) for s in (0, 5, 10, 15, 25)] == [0, 0.5, 1, 1.5, 2.5]
    assert [s for s in range(25) if run.at(s).epoch_ends] == [9, 14, 24]
    assert [s for s in range(25) if run.at(s).begins] == [0, 10, 15]
    assert [s for s in range(25) if run.at(s).ends] == [9, 14, 24]


@pytest.mark.parametrize("remainder", ["short", "drop"])
def test_tokens_are_those_of_the_batches(remainder):
    run = schedule(curriculum(epochs=1.7, remainder=remainder))
    for i, start in enumerate(run.starts):
        end = [*run.starts[1:], run.total_steps][i]
        assert run.tokens(i) == sum(run.samples.counted[p] for step in range(start, end) for p in run.batch(step))


def test_stage_of_is_the_first_visit():
    run = schedule(pocl(), n=8, batch_size=2)
    found = run.stage_of()
    assert [found[p] for p in run.samples.ranked()] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_plan_survives_json():
    import json

    for plan in (pocl(), clpd(), make_plan({"stages": [{"steps": 3, "temperature": {"from": 1, "to": 2, "over": "run"}}]})):
        filled = plan.filled(teachers=["a", "b"], epochs=1)
        again = make_plan(json.loads(json.dumps(filled.to_dict())))
        assert again == filled


def test_any_change_shows_in_the_facts():
    base = schedule(pocl()).facts()
    changes = {
        "plan.stages[0].epochs": schedule(pocl(epochs=7)),
        "plan.stages[3].temperature": schedule(pocl(temperature=[1, 1.33, 1.67, 2.1])),
        "batch_size": schedule(pocl(), batch_size=4),
        "seed": schedule(pocl(), seed=1),
        "samples": schedule(pocl(), n=104),
    }
    for key, other in changes.items():
        assert difference(base, other.facts()).startswith(f"{key} was"), key
    plan = pocl().filled(teachers=["weak", "strong"], epochs=2)
    samples = table(103)
    edited = Samples(samples.ids, samples.lengths, samples.counted, samples.scores, content="other")
    assert difference(base, plan.schedule(edited, batch_size=8, seed=0).facts()).startswith("data was")
    rescored = Samples(samples.ids, samples.lengths, samples.counted, samples.scores[::-1])
    assert difference(base, plan.schedule(rescored, batch_size=8, seed=0).facts()).startswith("scores was")
    assert difference(base, schedule(pocl()).facts()) is None


def test_random_plans_hold_together():
    generator = random.Random(7)
    for _ in range(150):
        buckets = generator.randint(1, 4)
        cuts = sorted(generator.sample(range(1, 10), buckets - 1))
        fractions = [(b - a) / 10 for a, b in itertools.pairwise([0, *cuts, 10])]
        stages = [
            Stage(
                buckets=generator.choice([None, tuple(generator.sample(range(buckets), generator.randint(1, buckets)))]),
                **generator.choice([{"epochs": generator.choice([0.3, 1, 2.5])}, {"steps": generator.randint(1, 9)}]),
                teacher=generator.choice(["weak", -1, 0]),
                restart_lr=generator.random() < 0.5,
            )
            for _ in range(generator.randint(1, 4))
        ]
        run = schedule(Plan(tuple(stages), tuple(fractions), order=generator.choice(["shuffled", "by_length"])), n=60, batch_size=7)
        assert sum(row["steps"] for row in run.table()) == run.total_steps == sum(steps for _, steps in run.segments)
        for step in range(run.total_steps):
            point = run.at(step)
            assert set(run.batch(step)) <= set(run.pool(point.stage))
            assert point.teacher in ("weak", "strong")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("pocle", "unknown preset 'pocle'; did you mean 'pocl'"),
        ({"preset": "pocl", "epoch": 3}, "epoch: unknown option of pocl; did you mean 'epochs'"),
        ({"epochs": 3}, "preset: missing"),
        ({"preset": "pocl", "stages": []}, "stages: given together with preset"),
        (3, "expected a preset's name"),
        ({"stages": []}, "stages: expected at least one"),
        ({"stages": 3}, "stages: expected a list"),
        ({"stages": [3]}, r"stages\[0\]. expected a mapping"),
        ({"stages": [{}, {"epoch": 1}]}, r"stages\[1\].epoch: unknown key; did you mean 'epochs'"),
        ({"stages": [{"epochs": 1, "steps": 2}]}, r"stages\[0\].steps: given together"),
        ({"stages": [{"epochs": -1}]}, r"stages\[0\].epochs: expected a number > 0"),
        ({"stages": [{"steps": 1.5}]}, r"stages\[0\].steps: expected a whole number"),
        ({"stages": [{"temperature": 0}]}, r"stages\[0\].temperature: expected numbers > 0"),
        ({"stages": [{"temperature": {"from": 1, "until": 2}}]}, r"temperature.until: unknown key"),
        ({"stages": [{"temperature": {"from": 1}}]}, "temperature: expected a number, or a ramp"),
        ({"stages": [{"temperature": {"from": 1, "to": 2, "shape": "round"}}]}, "temperature.shape: expected one of linear, cosine"),
        ({"stages": [{"kd_ratio": {"from": 0, "to": 2}}]}, r"kd_ratio: expected numbers in \[0, 1\]"),
        ({"stages": [{"kd_ratio": "much"}]}, "kd_ratio: expected a number"),
        ({"stages": [{"teacher": None, "kd_ratio": 0.5}]}, "kd_ratio: a stage without a teacher needs 0"),
        ({"stages": [{"teacher": True}]}, "teacher: expected a name"),
        ({"stages": [{"buckets": [0, 2]}], "fractions": [0.5, 0.5]}, "there are buckets 0 to 1, got 2"),
        ({"stages": [{"buckets": []}]}, "buckets: expected a list"),
        ({"stages": [{"parameters": 3}]}, "parameters: expected a mapping"),
        ({"stages": [{"reset_optimizer": 1}]}, "reset_optimizer: expected true or false"),
        ({"stages": [{}], "fractions": [0.5, 0.4]}, "fractions: expected numbers in"),
        ({"stages": [{}], "fractions": 3}, "fractions: expected a list"),
        ({"stages": [{}], "remainder": "keep"}, "remainder: expected one of short, drop"),
        ({"stages": [{}], "ordre": "sorted"}, "ordre: unknown key; did you mean 'order'"),
        ({"preset": "pocl", "order": "random"}, "order: expected one of"),
        ({"preset": "pocl", "temperature": [1, 2]}, "temperature: expected one value, or one for each of 4 stages, got 2"),
        ({"preset": "pocl", "buckets": 0}, "buckets: expected a whole number > 0"),
        ({"preset": "pocl", "cumulative": "yes"}, "cumulative: expected true or false"),
        ({"preset": "clpd", "teachers": ["a"], "fractions": [0.5, 0.5]}, "fractions: expected one for each of 1 teachers"),
        ({"preset": "clpd", "teachers": 2.5}, "teachers: expected a list of names"),
    ],
)
def test_wrong_plans_are_named(value, message):
    with pytest.raises(PlanError, match=message):
        make_plan(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedule(clpd(teachers=["weak", "stong"])), r"stages\[1\].teacher: unknown teacher 'stong'; did you mean 'strong'"),
        (lambda: schedule(clpd(teachers=3)), r"stages\[2\].teacher: number 2 of 2 teachers"),
        (lambda: schedule(kd(), teachers=[]), r"stages\[0\].teacher: number -1 of 0 teachers"),
        (lambda: schedule(pocl(), n=3, batch_size=8), r"stages\[0\]: has 0 samples: the bucket is empty"),
        (lambda: schedule(kd(remainder="drop"), n=3), r"stages\[0\]: has 3 samples: fewer than the batch of 8"),
        (lambda: pocl().filled(teachers=["a"]).schedule(table(9, scored=False), batch_size=2, seed=0), "they have no scores"),
        (lambda: Samples(["a", "b"], [1]), "lengths: expected one value for each of 2"),
        (lambda: Samples(["a", "b"], [1, 1], None, [1.0, math.nan]), "scores: not finite for 1 samples: b"),
    ],
)
def test_plans_that_cannot_be_followed_are_named(make, message):
    with pytest.raises(PlanError, match=message):
        make()
