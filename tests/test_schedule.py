"""When to measure: fixed intervals under any axis, and the one decision of the log schedule, with synthetic clocks."""

import math

import pytest

from grsd_callbacks.schedule import DECIDE_AT, MARGIN, FixedSchedule, LogSchedule, log_points, thinned


def due_steps(schedule, steps):
    return [step for step in steps if schedule.due(step)]


def simulate(schedule, num_steps, *, per_step=1e-3, cost=1e-2, cold=0.0, first=0):
    """(measured steps, seconds measuring, seconds training) of a loop on a synthetic clock; times may depend on it."""
    measured, measuring, training = [], 0.0, 0.0
    for step in range(first, num_steps):
        schedule.observe(step, measuring, measuring + training)
        if schedule.due(step) and schedule.affords():
            schedule.begins()
            measuring += at_step(cost, step) + (cold if not measured else 0.0)
            measured.append(step)
        training += at_step(per_step, step)
    return measured, measuring, training


def at_step(seconds, step):
    return seconds(step) if callable(seconds) else seconds


# ---- fixed ----


def test_fixed_measures_every_multiple():
    assert due_steps(FixedSchedule(5), range(21)) == [0, 5, 10, 15, 20]


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        (4, range(0, 30, 3), [0, 6, 9, 12, 18, 21, 24]),  # each first step at or after a multiple of 4
        (10, range(0, 40, 2), [0, 10, 20, 30]),  # two optimizers: the axis advances by two
        (2, [0, 7, 8, 9, 10], [0, 7, 8, 10]),  # several multiples crossed at once count once
        (3, [4, 5, 6, 7], [4, 6]),  # starts in the middle
        (3, [0, 0, 0, 1, 2, 3, 3], [0, 3]),  # micro-batches repeat a step
        (1, [0, 0, 1, 1, 2], [0, 1, 2]),
    ],
)
def test_fixed_measures_each_crossing_once(every, steps, expected):
    assert due_steps(FixedSchedule(every), steps) == expected


@pytest.mark.parametrize("every", [0, -3, 2.0, True, "10", None])
def test_fixed_refuses(every):
    with pytest.raises(ValueError, match="every_n_steps must be a positive integer"):
        FixedSchedule(every)


def test_fixed_state_round_trip():
    one = FixedSchedule(4)
    assert due_steps(one, range(6)) == [0, 4]
    other = FixedSchedule(4)
    other.load_state_dict(one.state_dict())
    assert due_steps(other, range(6, 13)) == due_steps(one, range(6, 13)) == [8, 12]


def test_fixed_keeps_its_own_interval_on_a_state_of_another():
    other = FixedSchedule(3)
    other.load_state_dict({"kind": "fixed", "every_n_steps": 4, "last": 4})
    assert due_steps(other, range(5, 10)) == [6, 9]
    other.load_state_dict({"kind": "log"})
    assert due_steps(other, [10, 12]) == [12]


# ---- log-spaced ----


@pytest.mark.parametrize(
    ("first", "last", "per_decade", "expected"),
    [
        (1, 1000, 1, [1, 10, 100, 1000]),
        (6, 100, 2, [10, 32, 100]),
        (1, 12, 10, [1, 2, 3, 4, 5, 6, 8, 10]),  # 10^(k/10) rounded, without repetition
        (5, 4, 10, []),
    ],
)
def test_log_points(first, last, per_decade, expected):
    found = log_points(first, last, per_decade)
    assert found == expected


@pytest.mark.parametrize(
    ("points", "room", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], 3, [2, 4, 6]),
        ([1, 2, 3], 5, [1, 2, 3]),
        ([1, 2, 3], 1, [3]),
        ([1, 2, 3], 0, []),
        ([1, 2, 3], -1, []),
        ([], 3, []),
    ],
)
def test_thinned_keeps_the_last_and_an_even_spread(points, room, expected):
    assert thinned(points, room) == expected


@pytest.mark.parametrize("room", range(1, 31))
def test_thinned_is_distinct_and_of_the_right_number(room):
    points = list(range(30))
    found = thinned(points, room)
    assert len(set(found)) == len(found) == room and found[-1] == 29
    assert max(b - a for a, b in zip([-1, *found], found)) <= math.ceil(30 / room)


def test_first_two_steps_are_measured_and_the_next_only_timed():
    schedule = LogSchedule(max_overhead=1.0, total_steps=10_000)
    assert simulate(schedule, DECIDE_AT)[0] == [0, 1]


@pytest.mark.parametrize("num_steps", [1_000, 10_000, 100_000])
@pytest.mark.parametrize("max_overhead", [0.02, 0.1])
@pytest.mark.parametrize("cost", [2e-3, 2e-2, 0.1])
def test_measuring_stays_within_its_share(num_steps, max_overhead, cost):
    """Whatever is affordable is spent, up to one measurement and the one kept for the end of the run."""
    schedule = LogSchedule(max_overhead=max_overhead, total_steps=num_steps)
    measured, measuring, training = simulate(schedule, num_steps, cost=cost)
    budget = max_overhead * training
    candidates = 2 + len(log_points(DECIDE_AT, num_steps - 1, 10))
    if len(measured) > 2:  # the first two are always made
        assert measuring + cost <= budget * (1 + 1e-6)
    assert len(measured) >= min(math.floor(budget / (MARGIN * cost)) - 3, candidates)


def test_pairs_cost_twice_as_much():
    kept = []
    for pair in (False, True):
        schedule = LogSchedule(max_overhead=0.1, total_steps=5_000, pair=pair)
        simulate(schedule, 5_000, cost=2e-2)
        kept.append(len(schedule.points))
    assert kept[1] <= kept[0] / 2 + 1


def test_all_candidates_if_affordable():
    schedule = LogSchedule(per_decade=10, max_overhead=0.02, total_steps=10_000)
    measured = simulate(schedule, 10_001, cost=1e-5)[0]
    assert measured == [0, 1, *log_points(DECIDE_AT, 10_000, 10)]


def test_nothing_more_if_not_affordable():
    schedule = LogSchedule(max_overhead=0.02, total_steps=1_000)
    assert simulate(schedule, 1_000, cost=10.0)[0] == [0, 1]
    assert schedule.points == [] and "0 of" in schedule.describe()


def test_a_cold_first_measurement_is_no_measure_of_the_next():
    """The cost of one is what the second, warm one took; the cold one only counts as spent."""
    schedule = LogSchedule(max_overhead=0.1, total_steps=3_000)
    measured = simulate(schedule, 3_000, cost=1e-2, cold=0.1)[0]
    assert len(measured) - 2 == pytest.approx((0.1 * 3_000 * 1e-3 - 0.12) / (MARGIN * 1e-2) - 2, abs=1)
    assert "one measurement 10 ms, one training step 1 ms" in schedule.describe()


def test_unknown_length_starts_where_the_share_allows_its_density():
    schedule = LogSchedule(per_decade=10, max_overhead=0.02, total_steps=None)
    measured, measuring, training = simulate(schedule, 200_000, cost=1e-2)
    first = 10 * MARGIN * 1e-2 / (0.02 * 1e-3 * math.log(10))
    assert measured[:2] == [0, 1] and measured[2] == pytest.approx(first, rel=0.3)
    assert measuring <= 0.02 * training + 2 * 1e-2  # the two of the start come on top
    ratios = [b / a for a, b in zip(measured[2:], measured[3:])]
    assert ratios == pytest.approx([10**0.1] * len(ratios), rel=0.01)


def test_no_limit_measures_every_candidate_without_timing():
    schedule = LogSchedule(per_decade=5, max_overhead=None, total_steps=100)
    assert simulate(schedule, 101, cost=1e6)[0] == [0, *log_points(1, 100, 5)]


def test_no_limit_and_no_length():
    schedule = LogSchedule(per_decade=1, max_overhead=None, total_steps=None)
    assert due_steps(schedule, range(1001)) == [0, 1, 10, 100, 1000]


def test_jumping_steps_and_repeated_steps():
    schedule = LogSchedule(per_decade=1, max_overhead=None, total_steps=1000)
    assert due_steps(schedule, [0, 0, 2, 2, 4, 8, 16, 16, 300, 900]) == [0, 2, 16, 300]


@pytest.mark.parametrize("saved_at", [1, 3, 5, 6, 40, 200])
@pytest.mark.parametrize("missing", [(), ("rates", "ledger", "per_step", "credit", "marks", "left_out")])
def test_log_state_round_trip(saved_at, missing):
    """A resumed schedule measures what the uninterrupted one does, also if saved before its decision.

    And if saved by a version that kept no accounts.
    """

    def new():
        return LogSchedule(max_overhead=0.05, total_steps=1_000)

    whole, _, _ = simulate(new(), 1_000, cost=2e-3)
    first, second = new(), new()
    before, measuring, training = simulate(first, saved_at, cost=2e-3)
    second.load_state_dict({key: value for key, value in first.state_dict().items() if key not in missing})
    after = []
    for step in range(saved_at, 1_000):
        second.observe(step, measuring, measuring + training)
        if second.due(step) and second.affords():
            second.begins()
            measuring += 2e-3
            after.append(step)
        training += 1e-3
    assert before + after == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_decade": 0}, "per_decade must be a positive integer"),
        ({"per_decade": 2.5}, "per_decade must be a positive integer"),
        ({"max_overhead": -0.1}, "max_overhead must be a positive number"),
        ({"max_overhead": 0}, "max_overhead must be a positive number"),
        ({"max_overhead": math.nan}, "max_overhead must be a positive number"),
        ({"max_overhead": math.inf}, "max_overhead must be a positive number"),
        ({"max_overhead": "2 %"}, "max_overhead must be a positive number"),
    ],
)
def test_log_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LogSchedule(**options)


def test_a_log_schedule_ignores_the_state_of_a_fixed_one():
    schedule = LogSchedule(max_overhead=None, total_steps=10)
    schedule.load_state_dict(FixedSchedule(3).state_dict())
    assert schedule.due(0)


# ---- the allowance holds after the decision ----


def busy(seconds, factor, until):
    """Seconds of a machine that is `factor` times slower before a step."""
    return lambda step: seconds * (factor if step < until else 1)


@pytest.mark.parametrize("until", [7, 30, 300])
@pytest.mark.parametrize("sparse", [False, True])
def test_training_that_turns_out_faster_leaves_measurements_out(until, sparse):
    """A slow start promises ten times the training time that comes; the end fits in nevertheless."""
    schedule = LogSchedule(max_overhead=0.1, total_steps=10_000, sparse=sparse)
    measured, measuring, training = simulate(schedule, 10_000, per_step=busy(1e-3, 10, until), cost=0.04)
    assert measuring + 0.04 <= 0.1 * training
    points = [p for p in schedule.points if p < 10_000]
    assert 0 < schedule.left_out == len(points) - len([s for s in measured if s >= DECIDE_AT])
    assert f"{schedule.left_out} of them left out" in schedule.describe()
    assert measuring > 0.8 * 0.1 * training and max(measured) > 5_000  # no more than needed, and not the last ones


@pytest.mark.parametrize("dearer", [2, 10])
def test_measurements_that_turn_out_dearer_are_left_out(dearer):
    """A slow machine while measuring, from step 100 on: the next ones are expected to cost what the latest did."""
    schedule = LogSchedule(max_overhead=0.05, total_steps=20_000)
    cost = 0.02
    measured, measuring, training = simulate(schedule, 20_000, cost=lambda step: cost * (dearer if step > 100 else 1))
    assert schedule.left_out > 0 and measuring + dearer * cost <= 0.05 * training
    assert max(measured) > 100


def test_nothing_is_left_out_where_times_stay_as_they_were():
    for total_steps in (1_000, 10_000, 100_000):
        schedule = LogSchedule(max_overhead=0.05, total_steps=total_steps)
        noisy = {step: 1 + 0.15 * (-1) ** step for step in range(total_steps)}
        measured, _, _ = simulate(schedule, total_steps, per_step=lambda s, by=noisy: 1e-3 * by[s], cost=3e-3)
        assert schedule.left_out == 0 and len(measured) == 2 + len([p for p in schedule.points if p < total_steps])


def test_unknown_length_never_spends_ahead():
    """Without a known end the allowance holds at every measurement, that of the end included."""
    schedule, measuring, training, later = LogSchedule(per_decade=2, total_steps=None), 0.0, 0.0, 0
    for step in range(50_000):
        schedule.observe(step, measuring, measuring + training)
        if schedule.due(step) and schedule.affords():
            schedule.begins()
            measuring += 0.02
            later += step >= DECIDE_AT
            assert step < DECIDE_AT or measuring + 0.02 <= 0.02 * training
        training += 1e-3
    assert later >= 2


def test_hooks_leave_half_of_the_allowance():
    """Where hooks alone take more than the allowance, measurements still get half of it, and no more."""
    schedule, measuring, training, measured = LogSchedule(max_overhead=0.02, total_steps=20_000), 0.0, 0.0, 0.0
    for step in range(20_000):
        schedule.observe(step, measuring, measuring + training)
        if schedule.due(step) and schedule.affords():
            schedule.begins()
            measuring, measured = measuring + 0.01, measured + 0.01
        measuring += 5e-5  # 5 % of a step
        training += 1e-3
    assert 0.5 * 0.01 * training < measured <= 0.01 * training


def test_sparse_measures_the_start_and_only_times_the_next():
    schedule = LogSchedule(max_overhead=0.02, total_steps=1_000, sparse=True)
    measured, measuring, training = simulate(schedule, 1_000, cost=8e-3)
    assert measured == [0] and measuring + 8e-3 <= 0.02 * training
    schedule = LogSchedule(max_overhead=0.02, total_steps=10_000, per_decade=2, sparse=True)
    measured, measuring, training = simulate(schedule, 10_000, cost=0.03)
    assert measured == [0, 100, 1_000]  # and the point at the end
    assert measuring + 0.03 <= 0.02 * training
    assert "one measurement 30 ms" in schedule.describe()
    unlimited = LogSchedule(per_decade=1, max_overhead=None, total_steps=100, sparse=True)
    assert due_steps(unlimited, range(101)) == [0, 1, 10, 100]


def test_pairs_are_accounted_for_as_two():
    """The second of a pair is measured at the next step without being due there."""
    schedule, measuring, training, due, second = LogSchedule(1, 0.05, 5_000, pair=True), 0.0, 0.0, [], False
    for step in range(5_000):
        schedule.observe(step, measuring, measuring + training)
        first = schedule.due(step) and schedule.affords()
        if first or second:
            schedule.begins()
            measuring += 0.01
        if first:
            due.append(step)
        second, training = first and step >= DECIDE_AT, training + 1e-3
    assert len(due) > 3 and schedule.state_dict()["ledger"]["hooks"] == pytest.approx(0.0, abs=1e-9)
    assert measuring <= 0.05 * training


def test_descriptions():
    assert FixedSchedule(7).describe() == "every 7 steps"
    schedule = LogSchedule(total_steps=1_000)
    assert schedule.describe() == "log-spaced, thinned once training steps are timed"
    simulate(schedule, 50, cost=1e-4)
    assert "of" in schedule.describe() and "at most 2 %" in schedule.describe()


def test_what_every_step_costs_is_reserved():
    """Hooks of 0.05 ms a step leave less room for measurements; at least half of the allowance stays for them."""

    def decided(hooks, total_steps=100_000):
        schedule, spent, elapsed = LogSchedule(10, 0.02, total_steps), 0.0, 0.0
        for step in range(7):
            schedule.due(step)
            schedule.observe(step, spent, elapsed)
            cost = 1.0 if step < 2 else hooks
            spent, elapsed = spent + cost, elapsed + cost + 0.01
        return schedule

    free, charged, dear = (decided(hooks) for hooks in (0.0, 5e-5, 1.0))
    assert len(free.points) > len(charged.points) > len(dear.points) >= 1
    cost = 1.2 * (len(charged.points) + 2)  # the margin, and two for the end
    assert 2.0 + cost + 5e-5 * 100_000 <= 0.02 * 0.01 * 100_000
    assert decided(5e-5, None).first > decided(0.0, None).first
    assert decided(1.0, None).first == pytest.approx(2 * decided(0.0, None).first, abs=1)


@pytest.mark.parametrize("missing", [(), ("rates", "ledger", "per_step", "credit", "marks", "left_out")])
@pytest.mark.parametrize("saved_at", [3, 50])
def test_resumed_without_a_limit_every_point_is_measured(saved_at, missing):
    """Whether the saved plan had been made (thinned) or not, and by a version that kept accounts or not."""
    saved = LogSchedule(per_decade=10, max_overhead=0.02, total_steps=1000)
    for step in range(saved_at):
        saved.observe(step, 0.5 * min(step, 2), 0.01 * step + 0.5 * min(step, 2))
        saved.due(step)
    resumed = LogSchedule(per_decade=10, max_overhead=None, total_steps=1000)
    resumed.load_state_dict({key: value for key, value in saved.state_dict().items() if key not in missing})
    due = []
    for step in range(saved_at, 1000):
        resumed.observe(step, 1.0, 1.0 + step)
        if resumed.due(step) and resumed.affords():
            due.append(step)
    assert due == [p for p in log_points(1, 1000, 10) if saved_at <= p < 1000]
