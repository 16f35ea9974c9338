from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest

from cat_pruning.serving.queue import BatchQueue, FullQueueError


@dataclass(eq=False)
class Image:
    kind: str
    since: float = 0.0
    most: int = 2
    share: str = ""

    def __post_init__(self) -> None:
        self.share = self.share or self.kind


def filled(*kinds: str, bound: int = 10) -> BatchQueue[Image]:
    queue: BatchQueue[Image] = BatchQueue(bound, 0.0, clock=lambda: 100.0)
    queue.put([Image(kind, since=float(number)) for number, kind in enumerate(kinds)])
    return queue


def kinds(batch: list[Image]) -> str:
    return "".join(image.kind for image in batch)


def test_a_batch_is_of_one_kind_and_no_more_than_it_may_be() -> None:
    queue = filled(*"abaab")
    assert [kinds(queue.take()) for _ in range(3)] == ["aa", "bb", "a"]
    assert len(queue) == 0


def test_all_images_fit_or_none_are_taken() -> None:
    queue = filled("a", "a", bound=3)
    with pytest.raises(FullQueueError):
        queue.put([Image("b"), Image("b")])
    assert len(queue) == 2
    queue.put([Image("b")])


def test_what_is_removed_is_not_computed() -> None:
    queue: BatchQueue[Image] = BatchQueue(10, 0.0, clock=lambda: 100.0)
    first, second = Image("a"), Image("a")
    queue.put([first, second])
    queue.remove([first])
    assert queue.take() == [second]
    queue.remove([second])  # which waits no more


def test_many_large_images_do_not_keep_small_ones_waiting() -> None:
    """Every large one takes nine times as long, so about nine small ones are computed to each of them."""
    queue: BatchQueue[Image] = BatchQueue(1000, 0.0, clock=lambda: 1e9)
    queue.put([Image("large", most=1, since=float(number)) for number in range(50)])
    queue.put([Image("small", most=1, since=1000.0 + number) for number in range(50)])
    order = []
    for _ in range(40):
        (image,) = queue.take()
        order.append(image.kind)
        queue.charge(image.share, 9.0 if image.kind == "large" else 1.0)
    assert 3 <= order.count("large") <= 5


def test_a_share_saves_no_time_up_while_it_asks_for_nothing() -> None:
    queue: BatchQueue[Image] = BatchQueue(1000, 0.0, clock=lambda: 1e9)
    queue.put([Image("a", most=1) for _ in range(60)])
    for _ in range(20):
        queue.take()
        queue.charge("a", 1.0)
    queue.put([Image("b", most=1) for _ in range(30)])
    order = []
    for _ in range(20):
        (image,) = queue.take()
        order.append(image.kind)
        queue.charge(image.kind, 1.0)
    assert 9 <= order.count("a") <= 11


def test_nothing_is_kept_of_shares_once_nothing_waits() -> None:
    queue: BatchQueue[Image] = BatchQueue(10, 0.0, clock=lambda: 100.0)
    for number in range(100):
        queue.put([Image(str(number))])
        (image,) = queue.take()
        queue.charge(image.share, 1.0)
    assert not queue._used
    assert not queue._kinds


def test_an_image_waits_for_others_of_its_batch_but_not_for_long() -> None:
    queue: BatchQueue[Image] = BatchQueue(10, 0.05)
    began = time.monotonic()
    queue.put([Image("a", since=began)])
    threading.Timer(0.01, lambda: queue.put([Image("a", since=time.monotonic())])).start()
    assert len(queue.take()) == 2
    began = time.monotonic()
    queue.put([Image("a", since=began)])
    assert len(queue.take()) == 1
    assert time.monotonic() - began >= 0.05


def test_a_closed_queue_hands_out_nothing() -> None:
    queue = filled("a")
    assert kinds(queue.close()) == "a"
    assert queue.take() == []
