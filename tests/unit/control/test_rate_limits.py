"""Token buckets per address and for all."""

import pytest

from controller.api.rate_limits import MAX_ADDRESSES, RateLimiter, network_of
from core.errors import Overloaded
from core.token_bucket import Rate, TokenBucket

HERE, THERE = "ipv4:192.0.2.1:5000", "ipv4:192.0.2.2:5000"


def test_a_bucket_gives_its_burst_at_once_and_then_its_rate() -> None:
    bucket = TokenBucket(Rate(2.0, burst=3), now_s=0)

    assert [bucket.take(0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(0.5), bucket.take(0.5)] == [True, False]


def test_a_bucket_never_holds_more_than_its_burst() -> None:
    bucket = TokenBucket(Rate(2.0, burst=3), now_s=0)

    assert [bucket.take(1000) for _ in range(4)] == [True, True, True, False]


def test_an_address_over_its_share_takes_nothing_from_others() -> None:
    limiter = RateLimiter(overall=Rate(0.1, burst=4), per_address=Rate(0.1, burst=2), now_s=0)
    limiter.take(HERE, now_s=0)
    limiter.take(HERE, now_s=0)
    for _ in range(10):
        with pytest.raises(Overloaded):
            limiter.take(HERE, now_s=0)

    limiter.take(THERE, now_s=0)
    limiter.take(THERE, now_s=0)


def test_all_addresses_together_are_limited() -> None:
    limiter = RateLimiter(overall=Rate(0.1, burst=1), per_address=Rate(0.1, burst=5), now_s=0)
    limiter.take(HERE, now_s=0)

    with pytest.raises(Overloaded):
        limiter.take(THERE, now_s=0)


def test_memory_is_bounded_however_many_addresses_call() -> None:
    limiter = RateLimiter(overall=Rate(1.0, burst=10**6), per_address=Rate(1.0, burst=1), now_s=0)
    for number in range(MAX_ADDRESSES + 10):
        limiter.take(f"ipv4:10.0.{number // 256}.{number % 256}:1", now_s=0)

    assert len(limiter) == MAX_ADDRESSES


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:%5B2001:db8:0:1:a:b:c:d%5D:5000", "2001:db8:0:1::/64"),
        ("ipv6:[2001:db8:0:1::2]:5000", "2001:db8:0:1::/64"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:5000", "192.0.2.1"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
    ],
)
def test_what_stands_for_a_caller(peer: str, network: str) -> None:
    assert network_of(peer) == network
