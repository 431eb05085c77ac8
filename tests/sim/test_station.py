"""The engine's queues against queueing theory: waits within the 99% confidence interval, Little's law, priorities."""

import math

import numpy as np
import pytest
import simpy
from scipy import stats

from moesim.sim.station import Station

CUSTOMERS, BATCHES = 60_000, 30


def waits_of(arrivals_s, services_s, *, servers=1, priority=None):
    """[N] seconds that each customer waited, and the station afterwards."""
    env = simpy.Environment()
    station = Station(env, "queue", servers)
    waited = np.zeros(len(arrivals_s))

    def customer(i):
        begin = env.now
        visit = yield from station.enter(0 if priority is None else int(priority[i]))
        waited[i] = env.now - begin
        yield env.timeout(services_s[i])
        visit.leave()

    def source():
        for i, gap in enumerate(arrivals_s):
            yield env.timeout(gap)
            env.process(customer(i))

    env.process(source())
    env.run()
    return waited, station


def agrees(waited, theory):
    """Batch means: the theory lies in the 99% confidence interval of the mean, after a tenth to warm up."""
    kept = waited[len(waited) // 10 :]
    means = np.array([batch.mean() for batch in np.array_split(kept, BATCHES)])
    half = stats.t.ppf(0.995, BATCHES - 1) * means.std(ddof=1) / math.sqrt(BATCHES)
    assert abs(means.mean() - theory) < half
    assert half < 0.25 * theory  # an interval that is wide enough for anything shows nothing


def erlang_c(servers, offered):
    """Probability that a customer waits in M/M/c with `offered` = arrival rate / service rate."""
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_mm1(load):
    rng = np.random.default_rng(1)
    waited, _ = waits_of(rng.exponential(1 / load, CUSTOMERS), rng.exponential(1, CUSTOMERS))
    agrees(waited, load / (1 - load))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_md1(load):
    rng = np.random.default_rng(2)
    waited, _ = waits_of(rng.exponential(1 / load, CUSTOMERS), np.ones(CUSTOMERS))
    agrees(waited, load / (2 * (1 - load)))


@pytest.mark.parametrize("servers", [2, 4])
def test_mmc(servers):
    rng = np.random.default_rng(3)
    rate = 0.8 * servers
    waited, _ = waits_of(rng.exponential(1 / rate, CUSTOMERS), rng.exponential(1, CUSTOMERS), servers=servers)
    agrees(waited, erlang_c(servers, rate) / (servers - rate))


def test_demand_goes_ahead_of_prefetch():
    """M/M/1 with two classes, nothing is interrupted: Cobham's formula (1954)."""
    rng = np.random.default_rng(4)
    first, all_ = 0.3, 0.8
    prefetch = rng.random(CUSTOMERS) >= first / all_
    waited, _ = waits_of(rng.exponential(1 / all_, CUSTOMERS), rng.exponential(1, CUSTOMERS), priority=prefetch)
    agrees(waited[~prefetch], all_ / (1 - first))
    agrees(waited[prefetch], all_ / ((1 - first) * (1 - all_)))


@pytest.mark.parametrize("servers", [1, 3])
def test_littles_law_and_utilisation_hold_exactly(servers):
    rng = np.random.default_rng(5)
    services = rng.exponential(1, 5000)
    waited, station = waits_of(rng.exponential(1.2 / servers, 5000), services, servers=servers)
    found = station.measure()
    assert found["here"] == pytest.approx(found["arrivals_per_s"] * found["stay_s"], rel=1e-9)
    assert found["wait_s"] == pytest.approx(waited.mean(), rel=1e-9)
    assert found["stay_s"] == pytest.approx((waited + services).mean(), rel=1e-9)
    busy = found["arrivals_per_s"] * services.mean() / servers
    assert found["utilisation"] == pytest.approx(busy, rel=1e-9)


def test_ties_are_served_in_order_of_arrival():
    waited, _ = waits_of(np.zeros(4), np.array([3.0, 1, 1, 1]), priority=np.array([0, 1, 0, 1]))
    assert waited.tolist() == [0, 4, 3, 5]
